"""The parts of versus_peft.py: settings, the two sides, each in a process of its own, and what is written of it all."""
