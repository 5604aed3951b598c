//! What a stream of bytes starts with.

use std::fmt;

use crate::dense;
use crate::embed::EMBED_MAGIC;
use crate::transcript::TRANSCRIPT_MAGIC;
use crate::wire::{AT_ENCODING, MAGIC};

/// The payloads of this crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A [`BeliefPacket`](crate::BeliefPacket).
    Packet,
    /// A belief over the whole vocabulary: [`DecodedDense`](crate::DecodedDense).
    Dense,
    /// An embedding: [`DecodedEmbed`](crate::DecodedEmbed).
    Embed,
    /// A [`Transcript`](crate::Transcript).
    Transcript,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Packet, Self::Dense, Self::Embed, Self::Transcript];

    /// Its name: `packet`, `dense`, `embed` or `transcript`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Packet => "packet",
            Self::Dense => "dense",
            Self::Embed => "embed",
            Self::Transcript => "transcript",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the bytes start with, by their magic, and by the encoding where a magic has two kinds. That they are a valid
/// payload only decoding can say.
#[must_use]
pub fn kind_of(bytes: &[u8]) -> Option<Kind> {
    match *bytes.first_chunk::<4>()? {
        MAGIC => Some(match bytes.get(AT_ENCODING) {
            Some(&tag) if dense::scalar_of_tag(tag).is_some() => Kind::Dense,
            _ => Kind::Packet,
        }),
        EMBED_MAGIC => Some(Kind::Embed),
        TRANSCRIPT_MAGIC => Some(Kind::Transcript),
        _ => None,
    }
}
