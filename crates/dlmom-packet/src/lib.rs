#![doc = include_str!("../README.md")]

mod compact;
mod dense;
mod embed;
mod error;
mod kind;
mod packet;
mod scalar;
mod transcript;
mod wire;

pub use dense::{
    DecodedDense, MAX_DENSE_BYTES, decode_dense, decode_dense_exact, dense_len, encode_dense_into,
};
pub use embed::{
    DecodedEmbed, EMBED_HEADER_LEN, EMBED_MAGIC, MAX_EMBED, decode_embed, decode_embed_exact,
    embed_len, encode_embed_into,
};
pub use error::{DecodeError, PacketError, Part, TranscriptError, UnknownEncodingName};
pub use kind::{Kind, kind_of};
pub use packet::{BeliefPacket, INPUT_TOLERANCE, MAX_K, MAX_VOCAB, NORM_SLACK};
pub use scalar::Scalar;
pub use transcript::{MAX_TRANSCRIPT_PACKETS, TRANSCRIPT_HEADER_LEN, TRANSCRIPT_MAGIC, Transcript};
pub use wire::{
    CHECKSUM_LEN, Decoded, Encoding, HEADER_LEN, MAGIC, MAX_PACKET_BYTES, MIN_PACKET_BYTES, Meta,
    PacketReader, VERSION, decode, decode_exact, encode, encode_into, encoded_len, max_encoded_len,
    packet_len,
};
