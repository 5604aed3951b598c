//! The packets of a latent span, in order: what a handoff transmits.

use crate::error::{PacketError, TranscriptError};
use crate::packet::{BeliefPacket, MAX_VOCAB};
use crate::wire::{
    Encoding, MIN_PACKET_BYTES, Meta, VERSION, decode_at, encode_into, field, packet_len,
};

/// The first four bytes of every encoded transcript, "DLTR".
pub const TRANSCRIPT_MAGIC: [u8; 4] = *b"DLTR";

/// Bytes before the first packet of a transcript.
pub const TRANSCRIPT_HEADER_LEN: usize = 28;

/// The most packets a transcript may hold. Part of the format.
pub const MAX_TRANSCRIPT_PACKETS: usize = 1 << 20;

const AT_VERSION: usize = 4;
const AT_FLAGS: usize = 5;
const AT_RESERVED: usize = 6;
const AT_VOCAB: usize = 8;
const AT_FINGERPRINT: usize = 12;
const AT_COUNT: usize = 20;
const AT_CHECKSUM: usize = 24;

/// Packets over one vocabulary, with the steps that produced them; steps grow strictly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transcript {
    vocab: u32,
    fingerprint: u64,
    packets: Vec<BeliefPacket>,
    steps: Vec<u32>,
}

impl Transcript {
    /// An empty transcript over a vocabulary of `vocab` tokens with this fingerprint.
    ///
    /// # Errors
    /// [`TranscriptError::VocabOverLimit`].
    pub fn new(vocab: u32, fingerprint: u64) -> Result<Self, TranscriptError> {
        if vocab > MAX_VOCAB {
            return Err(TranscriptError::VocabOverLimit { vocab });
        }
        Ok(Self {
            vocab,
            fingerprint,
            packets: Vec::new(),
            steps: Vec::new(),
        })
    }

    /// Appends the packet of `step`; on an error the transcript is unchanged.
    ///
    /// # Errors
    /// [`TranscriptError::VocabMismatch`], [`TranscriptError::StepOrder`] or [`TranscriptError::TooManyPackets`].
    pub fn push(&mut self, step: u32, packet: BeliefPacket) -> Result<(), TranscriptError> {
        let index = self.packets.len();
        if index >= MAX_TRANSCRIPT_PACKETS {
            return Err(TranscriptError::TooManyPackets { count: index + 1 });
        }
        if packet.vocab() != self.vocab {
            let (expected, found) = (self.vocab, packet.vocab());
            return Err(TranscriptError::VocabMismatch {
                index,
                expected,
                found,
            });
        }
        if let Some(&previous) = self.steps.last()
            && step <= previous
        {
            return Err(TranscriptError::StepOrder {
                index,
                previous,
                step,
            });
        }
        self.packets.push(packet);
        self.steps.push(step);
        Ok(())
    }

    /// Number of tokens of the vocabulary.
    #[must_use]
    pub fn vocab(&self) -> u32 {
        self.vocab
    }

    /// Fingerprint of the vocabulary.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Number of packets.
    #[must_use]
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Whether there is no packet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// The packets, in order.
    #[must_use]
    pub fn packets(&self) -> &[BeliefPacket] {
        &self.packets
    }

    /// The step of each packet, in order.
    #[must_use]
    pub fn steps(&self) -> &[u32] {
        &self.steps
    }

    /// Pairs of (step, packet), in order.
    #[must_use]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (u32, &BeliefPacket)> + '_ {
        self.steps.iter().copied().zip(&self.packets)
    }

    /// Takes the packets out, in order.
    #[must_use]
    pub fn into_packets(self) -> Vec<BeliefPacket> {
        self.packets
    }

    /// Length in bytes of the encoded transcript: what a link is charged for it.
    #[must_use]
    pub fn encoded_len(&self, encoding: Encoding) -> usize {
        let packets: usize = self.packets.iter().map(|p| packet_len(p, encoding)).sum();
        TRANSCRIPT_HEADER_LEN + packets
    }

    /// Appends the encoded transcript to `out` and returns its length in bytes.
    ///
    /// # Errors
    /// [`PacketError::OutOfMemory`] if `out` cannot grow; it is then unchanged.
    pub fn encode_into(&self, encoding: Encoding, out: &mut Vec<u8>) -> Result<usize, PacketError> {
        let bytes = self.encoded_len(encoding);
        // All of it at once, so that no later packet can fail to fit.
        out.try_reserve(bytes)
            .map_err(|_| PacketError::OutOfMemory { bytes })?;
        let start = out.len();
        out.extend_from_slice(&TRANSCRIPT_MAGIC);
        out.extend_from_slice(&[VERSION, 0, 0, 0]);
        out.extend_from_slice(&self.vocab.to_le_bytes());
        out.extend_from_slice(&self.fingerprint.to_le_bytes());
        out.extend_from_slice(&(self.packets.len() as u32).to_le_bytes());
        let checksum = crc32fast::hash(&out[start..]);
        out.extend_from_slice(&checksum.to_le_bytes());
        for (step, packet) in self.iter() {
            let meta = Meta {
                fingerprint: self.fingerprint,
                step,
            };
            encode_into(packet, meta, encoding, out)?;
        }
        Ok(bytes)
    }

    /// The encoded transcript.
    ///
    /// # Errors
    /// [`PacketError::OutOfMemory`].
    pub fn encode(&self, encoding: Encoding) -> Result<Vec<u8>, PacketError> {
        let mut out = Vec::new();
        self.encode_into(encoding, &mut out)?;
        Ok(out)
    }

    /// Reads one transcript from the front of `bytes`; also returns how many bytes it took.
    ///
    /// Safe on bytes from anyone, as [`decode`](crate::decode()) is.
    ///
    /// # Errors
    /// One [`TranscriptError`] for each way the bytes can be wrong.
    pub fn decode(bytes: &[u8]) -> Result<(Self, usize), TranscriptError> {
        if let Some(&found) = bytes.first_chunk::<4>()
            && found != TRANSCRIPT_MAGIC
        {
            return Err(TranscriptError::BadMagic { found });
        }
        if let Some(&version) = bytes.get(AT_VERSION)
            && version != VERSION
        {
            return Err(TranscriptError::UnsupportedVersion { version });
        }
        let Some((header, body)) = bytes.split_first_chunk::<TRANSCRIPT_HEADER_LEN>() else {
            return Err(TranscriptError::TruncatedHeader {
                needed: TRANSCRIPT_HEADER_LEN,
                available: bytes.len(),
            });
        };
        let flags = header[AT_FLAGS];
        if flags != 0 {
            return Err(TranscriptError::UnknownFlags { flags });
        }
        let reserved = u16::from_le_bytes(field::<AT_RESERVED, 2, _>(header));
        if reserved != 0 {
            return Err(TranscriptError::ReservedNotZero { value: reserved });
        }
        let stored = u32::from_le_bytes(field::<AT_CHECKSUM, 4, _>(header));
        let computed = crc32fast::hash(&header[..AT_CHECKSUM]);
        if stored != computed {
            return Err(TranscriptError::Checksum { stored, computed });
        }
        let vocab = u32::from_le_bytes(field::<AT_VOCAB, 4, _>(header));
        let fingerprint = u64::from_le_bytes(field::<AT_FINGERPRINT, 8, _>(header));
        let count = u32::from_le_bytes(field::<AT_COUNT, 4, _>(header)) as usize;
        if count > MAX_TRANSCRIPT_PACKETS {
            return Err(TranscriptError::TooManyPackets { count });
        }

        let mut transcript = Self::new(vocab, fingerprint)?;
        // The count is a claim; the bytes there bound how many packets can follow.
        let likely = count.min(body.len() / MIN_PACKET_BYTES);
        transcript.packets.reserve(likely);
        transcript.steps.reserve(likely);
        let mut offset = TRANSCRIPT_HEADER_LEN;
        for index in 0..count {
            let (decoded, consumed) = decode_at(&bytes[offset..], offset)
                .map_err(|source| TranscriptError::Packet { index, source })?;
            if decoded.meta.fingerprint != fingerprint {
                let (expected, found) = (fingerprint, decoded.meta.fingerprint);
                return Err(TranscriptError::FingerprintMismatch {
                    index,
                    expected,
                    found,
                });
            }
            transcript.push(decoded.meta.step, decoded.packet)?;
            offset += consumed;
        }
        Ok((transcript, offset))
    }

    /// Reads the one transcript that `bytes` is.
    ///
    /// # Errors
    /// As for [`decode`](Self::decode), and [`TranscriptError::TrailingBytes`].
    pub fn decode_exact(bytes: &[u8]) -> Result<Self, TranscriptError> {
        let (transcript, offset) = Self::decode(bytes)?;
        if offset < bytes.len() {
            return Err(TranscriptError::TrailingBytes {
                offset,
                count: bytes.len() - offset,
            });
        }
        Ok(transcript)
    }
}
