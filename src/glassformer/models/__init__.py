"""Models: parts assembled. A Spec says what, ``build`` makes it, presets know the published shapes."""

from .block import Block
from .encoder_decoder import EncoderDecoder, EncoderDecoderModel
from .transformer import Decoder, Encoder, Transformer, TransformerModel

__all__ = ["Block", "Decoder", "Encoder", "EncoderDecoder", "EncoderDecoderModel", "Transformer", "TransformerModel"]
