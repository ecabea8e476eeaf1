"""The nano model's shapes: the classes of the full model, in small."""

from pathlib import Path

from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from uso.model.style_projector import StyleProjector

NANO = Path(__file__).parents[1] / "assets" / "nano"
# all pictures are squares of it: others need another way to find the content (README, "Next")
NATIVE_SIDE = 128
NATIVE_SCALE = 0.25  # of the `content_long_size` asked for: 512 fills the square
SHIFT = 3.0  # of the schedule
MAX_SEQUENCE_LENGTH = 24
VOCABULARY = 1500
TEXT_WIDTH = 128
STYLE_SIZE = 128
STYLE_WIDTH = 192
STYLE_LEVELS = (-1, -3, -5)  # hidden states
STYLE_TOKENS = 24  # of all levels


def build_vae() -> AutoencoderKL:
    """FLUX's autoencoder (8x8 pixels to 16 channels, no quant convolutions) with narrow layers."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 80, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,  # decisive for so narrow layers
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    assert vae.encoder.conv_out.bias is not None
    # Nearly deterministic latents at first: without this the first hundred steps learn from noise.
    nn.init.constant_(vae.encoder.conv_out.bias[16:], -5.0)
    return vae


def build_transformer() -> FluxTransformer2DModel:
    """FLUX's transformer: 2 double and 6 single blocks of 3 heads of 64."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )


def build_text_encoders(eos_token_id: int) -> nn.ModuleDict:
    """CLIP's and T5's encoder, by their names in the pipeline."""
    clip = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=eos_token_id - 1,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    t5 = T5Config(
        vocab_size=VOCABULARY,
        d_model=TEXT_WIDTH,
        d_kv=64,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return nn.ModuleDict({"text_encoder": CLIPTextModel(clip), "text_encoder_2": T5EncoderModel(t5)})


def build_style_path() -> nn.ModuleDict:
    """The encoder of style pictures and its projector, by their names in the pipeline."""
    siglip = SiglipVisionConfig(
        hidden_size=STYLE_WIDTH,
        intermediate_size=3 * STYLE_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=STYLE_SIZE,
        patch_size=16,
        vision_use_head=False,
    )
    projector = StyleProjector(
        hidden_size=192,
        siglip_width=STYLE_WIDTH,
        siglip_tokens=(STYLE_SIZE // 16) ** 2,
        tokens_per_level=STYLE_TOKENS // len(STYLE_LEVELS),
        levels=STYLE_LEVELS,
    )
    return nn.ModuleDict({"image_encoder": SiglipVisionModel(siglip), "style_projector": projector})


def build_conditioning(eos_token_id: int) -> nn.ModuleDict:
    """The encoders of text and style pictures, by their names in the pipeline."""
    return nn.ModuleDict({**build_text_encoders(eos_token_id), **build_style_path()})
