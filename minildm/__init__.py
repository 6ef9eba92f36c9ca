"""minildm: Stable Diffusion, small enough to read and exact enough to be it.

Shapes are written with these letters throughout: B batch, C channels, H and W height and width, L tokens, D features,
T timesteps, N pictures in all.
"""

__version__ = "0.1.0"


def load(name_or_dir: str):
    """Opens a text-to-image model.

    Args:
        name_or_dir: a folder that minildm wrote, a folder in the diffusers layout, a single `.safetensors` or `.ckpt` in the
            CompVis layout, or the name of a model on the hub, "owner/model", which is fetched.

    Returns:
        A `minildm.pipeline.Pipeline`.

    Raises:
        FileNotFoundError, ValueError: as `Pipeline.load`.
        ImportError, OSError: the name cannot be fetched; says why.
    """
    from minildm.convert import fetch, is_hub_name  # here, so that `import minildm` costs nothing
    from minildm.pipeline import Pipeline

    return Pipeline.load(fetch(str(name_or_dir)) if is_hub_name(str(name_or_dir)) else name_or_dir)
