"""A mistake for each exercise of the notebooks: in the notebook's own solution the first text becomes the second."""

MISTAKES = {
    "00_tour": {
        "trained_numbers": ("(d_out + d_in)", "d_out * d_in"),  # of BA, which is never trained
        "lora_forward": ("(s * B)", "B"),
        "merged_weight": ("return W + (s * B) @ A", "W += (s * B) @ A\n    return W"),  # in place
        "bits_per_character": ("/ math.log(2)", "* math.log(2)"),
    },
    "01_engine": {
        "division_vjp": ("-dy * a", "dy * a"),
        "mean_vjp": ("dy / len(x)", "dy"),  # of the sum
        "rows_vjp": ("np.add.at(dx, index, dy)", "dx[index] += dy"),  # an index named twice is added once
        "gradients": ("found.get(parent, 0.0) + grad", "grad"),  # assigned, not added
    },
    "02_transformer": {
        "rms_norm_vjp": (
            "(dx_hat - x_hat",
            "(dx_hat - dx_hat.mean(axis=1, keepdims=True) - x_hat",
        ),  # layer norm's
        "silu_vjp": ("(s + x * s * (1 - s))", "s"),  # half of the product rule
        "cross_entropy_gradient": ("p / len(p)", "p"),  # of the sum, not of the mean
        "tied_gradient": ("np.add.at(dE, ids, dx)", "dE[ids] += dx"),  # a token read twice receives once
    },
    "03_lora": {
        "break_even_rank": ("-(-d_out * d_in // (d_out + d_in))", "d_out * d_in // (d_out + d_in)"),  # rounded down
        "core_gradient": ("(dy @ (s * B)).T @ (x @ A.T)", "(x @ A.T).T @ (dy @ (s * B))"),  # the transpose
        "dropout_backward": ("dy @ W + m * (dh @ A)", "m * (dy @ W + dh @ A)"),  # the mask on the base's way, too
        "gap": ("2.0 ** (math.floor(math.log2(w)) - bits)", "w * 2.0**-bits"),  # grows within a power of two
    },
    "04_memory": {
        "dora_on_attention": ("x = 2 * N * d", "x = 4 * N * d"),  # as if q, k and v kept one each
        "relu": ("np.unpackbits(kept, count=dy.size).reshape(dy.shape)", "x > 0"),  # x lives on in the closure
        "longest_context": ("return T", "return T + 64"),  # the first that does not fit
    },
    "05_lora_plus": {
        "centred_lr_scale": ("math.sqrt(ratio) if", "ratio if"),
        "equal_alpha": ('(ratio if optimizer == "adam" else math.sqrt(ratio))', "ratio"),  # of Adam alone
        "best_ratios": ("losses[fixed]", "losses[:, fixed]"),  # a column: B's rate held
        "first_move": (" * math.sqrt(2 / math.pi)", ""),  # as if |x_j| were 1
    },
    "06_vera": {
        "trained_numbers": ("sum(r + d_out", "r + sum(d_out"),  # as if all layers shared one d
        "dd_by_tokens": ("(dy * b)", "dy"),
        "dA_if_trained": ("b[:, None] * B * d", "b[:, None] * B"),
        "rate_factors": ("1.0 / c", "1.0"),  # b as before
    },
    "07_delta_lora": {
        "after_step": ('p["A_before"], p["B_before"] = p["A"].copy(), p["B"].copy()', "pass"),
        "as_lora": ("(1 + update_ratio)", "update_ratio"),  # W's own change alone
        "control_rate": ("(1 + update_ratio)", "(1 + update_ratio * (1 - momentum))"),
        "rank_bound": ("r if start_step == 0 else 2 * r", "2 * r"),
    },
    "08_dora": {
        "row_norms": (  # W's size, which was to be avoided
            "np.sqrt((W * W).sum(axis=1) + (cross * sB).sum(axis=1))",
            "np.linalg.norm(W + s * (B @ A), axis=1)",
        ),
        "full_gradient": ("axis=1, keepdims=True", "axis=0"),  # along columns
        "merge_per_input": ("np.linalg.norm(V", "np.linalg.norm(W"),
        "dm_from": ("/ m", "/ np.linalg.norm(V, axis=1)"),  # m and n changed over
    },
    "09_family": {
        "seeds_needed": (" ** 2", ""),
        "not_beaten": ("] and one", "] or one"),  # better in one is not enough
        "forgetting_at": ("b[:end][::-1], a[:end][::-1]", "b, a"),  # np.interp wants a rising b
        "at_least_one": ("1 - confidence**comparisons", "comparisons * (1 - confidence)"),
    },
    "10_gpu": {
        "step_time": ('launches * card["seconds per launch"]', "0.0"),
        "crossing": (" ** 0.5", ""),  # of d²
        "softmax": ("xp.exp", "np.exp"),  # NumPy's, whatever x is
        "mean_loss": ("float(sum(losses) / len(losses))", "sum(map(float, losses)) / len(losses)"),  # waits for each
    },
    "11_your_method": {
        "diagonal_gradient": ("(s * B)", "B"),
        "dR_from_dW": ("(s * B).T @ dW @ A.T", "A @ dW.T @ (s * B)"),  # the transpose, which has the same shape
        "rank_for_budget": ("min(int(np.sqrt(r * (d_in + d_out))), d_in, d_out)", "int(np.sqrt(r * (d_in + d_out)))"),
        "ia3_backward": ("(dy * p.l)", "dy"),
    },
}
