#![doc = include_str!("../README.md")]

mod error;
mod packet;
mod transcript;
mod wire;

pub use error::{DecodeError, PacketError, Part, TranscriptError, UnknownEncodingName};
pub use packet::{BeliefPacket, INPUT_TOLERANCE, MAX_K, MAX_VOCAB, NORM_SLACK};
pub use transcript::{MAX_TRANSCRIPT_PACKETS, TRANSCRIPT_HEADER_LEN, TRANSCRIPT_MAGIC, Transcript};
pub use wire::{
    CHECKSUM_LEN, Decoded, Encoding, HEADER_LEN, MAGIC, MAX_PACKET_BYTES, MIN_PACKET_BYTES, Meta,
    PacketReader, VERSION, decode, decode_exact, encode, encode_into, encoded_len,
};
