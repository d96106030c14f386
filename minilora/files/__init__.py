"""Bytes on a disk: saves that are all or nothing, and readers that believe nothing unchecked."""
