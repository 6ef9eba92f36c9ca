"""minildm: Stable Diffusion, small enough to read and exact enough to be it.

Shapes are written with these letters throughout: B batch, C channels, H and W height and width, L tokens, D features,
T timesteps, N pictures in all.
"""

__version__ = "0.1.0"


def load(name_or_dir: str, vocabulary: str | None = None, prediction_type: str | None = None):
    """Opens a text-to-image model.

    Args:
        name_or_dir: "shapes32", "shapes64" or "emoji", which come with the package; a folder that minildm wrote; a folder in
            the diffusers layout; a single `.safetensors` or `.ckpt` in the CompVis layout; or the name of a model on the hub,
            "owner/model", which is fetched.
        vocabulary: CLIP's, for a single file, which does not hold it; looked for beside the file if None.
        prediction_type: for a single file, which does not say it; guessed, with a warning where that is uncertain, if None.

    Returns:
        A `minildm.pipeline.Pipeline`.  What comes with the package is on the CPU, which is fast enough for it; everything else
        on the best device there is.

    Raises:
        FileNotFoundError, ValueError: as `Pipeline.load`.
        ImportError, OSError: the name cannot be fetched; says why.
    """
    import torch

    from minildm.convert import fetch, is_hub_name  # here, so that `import minildm` costs nothing
    from minildm.pipeline import Pipeline
    from minildm.shipped import folder_of

    if shipped := folder_of(str(name_or_dir)):
        return Pipeline.load(shipped, device="cpu", dtype=torch.float32)
    where = fetch(str(name_or_dir)) if is_hub_name(str(name_or_dir)) else name_or_dir
    return Pipeline.load(where, vocabulary=vocabulary, prediction_type=prediction_type)
