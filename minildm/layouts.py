"""How published files name the weights that have other names here: tables of patterns, from our names to theirs.

Two layouts are in use.  CompVis's is that of the original code, one file for all networks, whose U-Net numbers its blocks in
one row (input_blocks.0 to .11), so that its table does arithmetic.  Diffusers' is a folder for each network.
"""

import re
from collections.abc import Callable, Iterable

# Each rule is a regular expression on our name and what it becomes: a template, or a function of the numbers it found.
# All rules of a table are applied in order, so that one renames the block and a later one the layer in it.
Table = list[tuple[str, str | Callable[..., str]]]

TRANSFORMER: Table = [  # the inside of a U-Net's transformer, the same in both layouts
    (r"\.attn\.(\d+)\.blocks\.", r".attn.\1.transformer_blocks."),
    (r"^mid\.attn\.blocks\.", "mid.attn.transformer_blocks."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff\.proj\.", ".ff.net.0.proj."),
    (r"\.ff\.out\.", ".ff.net.2."),
]

DIFFUSERS: Table = [  # the blocks, the same in U-Net and autoencoder
    (r"\b(down|up)\.(\d+)\.res\.", r"\1_blocks.\2.resnets."),
    (r"\b(down|up)\.(\d+)\.attn\.", r"\1_blocks.\2.attentions."),
    (r"\b(down|up)\.(\d+)\.resample\.", r"\1_blocks.\2.\1samplers.0."),
    (r"\bmid\.res1\.", "mid_block.resnets.0."),
    (r"\bmid\.attn\.", "mid_block.attentions.0."),
    (r"\bmid\.res2\.", "mid_block.resnets.1."),
    (r"\.time\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\bnorm_out\.", "conv_norm_out."),
]

DIFFUSERS_UNET: Table = [
    *TRANSFORMER,
    (r"^time_mlp\.0\.", "time_embedding.linear_1."),
    (r"^time_mlp\.2\.", "time_embedding.linear_2."),
    (r"^pooled_mlp\.0\.", "add_embedding.linear_1."),
    (r"^pooled_mlp\.2\.", "add_embedding.linear_2."),
    *DIFFUSERS,
]

DIFFUSERS_CONTROLNET: Table = [
    (r"^hint\.convs\.0\.", "controlnet_cond_embedding.conv_in."),
    (r"^hint\.convs\.(\d+)\.", lambda n: f"controlnet_cond_embedding.blocks.{n - 1}."),
    (r"^hint\.out\.", "controlnet_cond_embedding.conv_out."),
    (r"^zeros\.", "controlnet_down_blocks."),
    (r"^zero_mid\.", "controlnet_mid_block."),
    *DIFFUSERS_UNET,
]

DIFFUSERS_VAE: Table = [
    (r"\bmid\.attn\.norm\.", "mid.attn.group_norm."),
    (r"\bmid\.attn\.attn\.", "mid.attn."),
    (r"\.to_out\.", ".to_out.0."),
    *DIFFUSERS,
]

TRANSFORMERS_TEXT: Table = [
    (r"^(token|position)_embedding\.", r"text_model.embeddings.\1_embedding."),
    (r"^blocks\.", "text_model.encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.to_(\w+)\.", r".self_attn.\1_proj."),
    (r"^final_norm\.", "text_model.final_layer_norm."),
    (r"^projection\.", "text_projection."),
]

OPENCLIP_TEXT: Table = [  # its in_proj is cut in three, and its text_projection transposed, when the file is opened
    (r"^position_embedding\.weight", "positional_embedding"),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm(\d)\.", r".ln_\1."),
    (r"\.attn\.to_([qkv])\.", r".attn.in_proj.\1."),
    (r"\.attn\.to_out\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^final_norm\.", "ln_final."),
    (r"^projection\.weight", "text_projection"),
]


def compvis_unet(depths: tuple[int, ...], blocks: int = 2) -> Table:
    """CompVis's names for a U-Net: every ResBlock and every change of resolution takes the next number.

    Args:
        depths: transformer blocks of each level, as in `UNetConfig`; a level's upsampling comes after its transformer, if any.
        blocks: ResBlocks a level on the way down, as in `UNetConfig`.
    """
    row = blocks + 1  # numbers a level
    after = [2 if depth else 1 for depth in reversed(depths)]
    return [
        *TRANSFORMER,
        (r"\b(res\.?\d+)\.norm1\.", r"\1.in_layers.0."),
        (r"\b(res\.?\d+)\.conv1\.", r"\1.in_layers.2."),
        (r"\b(res\.?\d+)\.norm2\.", r"\1.out_layers.0."),
        (r"\b(res\.?\d+)\.conv2\.", r"\1.out_layers.3."),
        (r"\.time\.", ".emb_layers.1."),
        (r"\.skip\.", ".skip_connection."),
        (r"^time_mlp\.", "time_embed."),
        (r"^pooled_mlp\.", "label_emb.0."),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^down\.(\d+)\.res\.(\d+)\.", lambda i, j: f"input_blocks.{row * i + j + 1}.0."),
        (r"^down\.(\d+)\.attn\.(\d+)\.", lambda i, j: f"input_blocks.{row * i + j + 1}.1."),
        (r"^down\.(\d+)\.resample\.conv\.", lambda i: f"input_blocks.{row * i + row}.0.op."),
        (r"^mid\.res1\.", "middle_block.0."),
        (r"^mid\.attn\.", "middle_block.1."),
        (r"^mid\.res2\.", "middle_block.2."),
        (r"^up\.(\d+)\.res\.(\d+)\.", lambda i, j: f"output_blocks.{row * i + j}.0."),
        (r"^up\.(\d+)\.attn\.(\d+)\.", lambda i, j: f"output_blocks.{row * i + j}.1."),
        (r"^up\.(\d+)\.resample\.", lambda i: f"output_blocks.{row * i + blocks}.{after[i]}."),
        (r"^norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
    ]


def compvis_controlnet(depths: tuple[int, ...], blocks: int, hint_convs: int) -> Table:
    """CompVis's names for a ControlNet, without their prefix control_model.

    Args:
        depths, blocks: as for `compvis_unet`.
        hint_convs: convolutions of the hint encoder before its last one; activations are numbered, too.
    """
    return [
        (r"^hint\.convs\.(\d+)\.", lambda n: f"input_hint_block.{2 * n}."),
        (r"^hint\.out\.", f"input_hint_block.{2 * hint_convs}."),
        (r"^zeros\.(\d+)\.", r"zero_convs.\1.0."),
        (r"^zero_mid\.", "middle_block_out.0."),
        *compvis_unet(depths, blocks),
    ]


def compvis_vae(levels: int) -> Table:
    """CompVis's names for an autoencoder, whose decoder counts its levels from the highest resolution."""
    return [
        (r"\b(up|down)\.(\d+)\.res\.", r"\1.\2.block."),
        (r"\b(up|down)\.(\d+)\.resample\.", r"\1.\2.\1sample."),
        (r"\bup\.(\d+)\.", lambda i: f"up.{levels - 1 - i}."),
        (r"\.skip\.", ".nin_shortcut."),
        (r"\bmid\.res(\d)\.", r"mid.block_\1."),
        (r"\bmid\.attn\.attn\.to_out\.", "mid.attn_1.proj_out."),
        (r"\bmid\.attn\.attn\.to_", "mid.attn_1."),
        (r"\bmid\.attn\.", "mid.attn_1."),
    ]


# Other spellings of the same names, by age or by program: from what a file may say to what the tables above expect.
SPELLINGS = {
    "vae": [(r"\.query\.", ".to_q."), (r"\.key\.", ".to_k."), (r"\.value\.", ".to_v."), (r"\.proj_attn\.", ".to_out.0.")],
    "text": [(r"^(?=embeddings\.|encoder\.|final_layer_norm\.)", "text_model.")],
}

# What a file may hold beside the weights, and what nobody misses.
NOT_WEIGHTS = r"(^|\.)(position_ids|logit_scale|attn_mask)$"


def rename(key: str, table: Table) -> str:
    """Applies every rule of a table to one name."""
    for pattern, there in table:
        key = re.sub(pattern, there if isinstance(there, str) else lambda m, f=there: f(*map(int, m.groups())), key)
    return key


def names(ours: Iterable[str], table: Table) -> dict[str, str]:
    """What the published layout calls each of our weights; turned round, it reads the layout.

    Raises:
        ValueError: two of ours would get one name, so that the table cannot be turned round.
    """
    theirs = {key: rename(key, table) for key in ours}
    if len(set(theirs.values())) < len(theirs):
        raise ValueError("the table gives two weights one name")
    return theirs
