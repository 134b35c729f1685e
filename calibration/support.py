"""The table of supported models, made from what the families declare."""

from __future__ import annotations

from calibration.families import Family, family, family_names

__all__ = ["support_table"]

_HEAD = ("family", "models", "architecture", "aliases", "GGUF", "rotation")


def support_table() -> str:
    """A Markdown table with a row for each family: its models, the architecture that config.json
    names, short names of models, whether GGUF files are read, and whether the residual stream can be
    rotated, which is W4A8's default, or the values alone.
    """
    rows = [_HEAD, ("---",) * len(_HEAD), *(_row(family(name)) for name in family_names())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(one: Family) -> tuple[str, ...]:
    aliases = ", ".join(f"`{alias}`" for alias in one.aliases)
    gguf = "yes" if one.gguf else "no"
    return f"`{one.name}`", one.models, f"`{one.architecture}`", aliases, gguf, _rotation(one)


def _rotation(one: Family) -> str:
    """Of a model with transformers' defaults: which norms there are does not depend on sizes."""
    from transformers import AutoConfig

    from calibration.checkpoints.checkpoint import plain_config
    from calibration.checkpoints.foreign import quiet_transformers
    from calibration.transforms.rotation import obstacle

    with quiet_transformers():
        config = AutoConfig.for_model(one.model_type)
    return "values" if obstacle(one.decoder(plain_config(config))) else "yes"
