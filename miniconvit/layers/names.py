"""Parameters below a prefix: a composite sees the short names, the model the full ones."""


def part(params, prefix):
    """The entries of `params` below `prefix`, under their short names."""
    return {key[len(prefix) :]: value for key, value in params.items() if key.startswith(prefix)}


def prefixed(grads, prefix):
    """The inverse of `part`: full names again."""
    return {prefix + key: value for key, value in grads.items()}
