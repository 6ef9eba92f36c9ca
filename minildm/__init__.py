"""minildm: Stable Diffusion, small enough to read and exact enough to be it.

Shapes are written with these letters throughout: B batch, C channels, H and W height and width, L tokens, D features,
T timesteps, N pictures in all.
"""

__version__ = "0.1.0"


def load(name_or_dir: str):
    """Opens a text-to-image model: a folder that minildm wrote.

    Args:
        name_or_dir: the folder.

    Returns:
        A `minildm.pipeline.Pipeline`.

    Raises:
        FileNotFoundError, ValueError: as `Pipeline.load`.
    """
    from minildm.pipeline import Pipeline  # here, so that `import minildm` costs nothing

    return Pipeline.load(name_or_dir)
