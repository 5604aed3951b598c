//! What crosses a link between agents, in the bytes that really cross it (suite A3).

use dlmom_packet::{
    BeliefPacket, DecodeError, Encoding, Meta, PacketError, Scalar, Transcript, TranscriptError,
    decode_dense_exact, decode_embed_exact, decode_exact, encode_dense_into, encode_embed_into,
    encode_into,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backend::Align;

/// The kind of message that consensus sends down to the agents in latent steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LinkMessage {
    /// The mixture embedding in the model's dtype; means something only between agents of one model.
    Embed,
    /// A belief packet of `k` entries.
    Belief,
    /// The distribution over the whole vocabulary, without ids.
    Logits,
    /// The agent's last hidden state, aligned with the input embeddings of its model (`LatentMAS`, arXiv
    /// 2511.20639); agents of one model, one at a time.
    Hidden,
}

impl LinkMessage {
    /// The name under which it is recorded.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Belief => "belief",
            Self::Logits => "logits",
            Self::Hidden => "hidden",
        }
    }
}

/// How the numbers of a message are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WireEncoding {
    /// 4 bytes a probability, exact.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Bit-packed id gaps and 8-bit logarithmic probabilities; packets only.
    Compact,
}

impl WireEncoding {
    /// The packet encoding.
    #[must_use]
    pub fn packet(self) -> Encoding {
        match self {
            Self::F32 => Encoding::F32,
            Self::F16 => Encoding::F16,
            Self::Bf16 => Encoding::Bf16,
            Self::Compact => Encoding::Compact,
        }
    }

    /// The scalar of messages without ids; `compact` has none.
    #[must_use]
    pub fn scalar(self) -> Option<Scalar> {
        self.packet().scalar()
    }
}

/// What consensus sees of an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Support {
    /// Every logit (the paper's Algorithm 1): V values of the model's dtype go up in every step.
    Full,
    /// Only what crossed the uplink: the agent's own packet, its missing mass spread evenly over the other tokens.
    Packet,
}

/// What crosses the links of an experiment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinkSpec {
    /// Message of latent steps.
    pub message: LinkMessage,
    /// How packets and whole-vocabulary messages are written; embeddings travel in the model's dtype.
    pub encoding: WireEncoding,
    /// What consensus sees.
    pub support: Support,
    /// How hidden states become input embeddings; ignored by the other messages.
    #[serde(default)]
    pub align: Align,
}

impl Default for LinkSpec {
    /// Packets in f32; consensus sees every logit.
    fn default() -> Self {
        Self {
            message: LinkMessage::Belief,
            encoding: WireEncoding::F32,
            support: Support::Full,
            align: Align::default(),
        }
    }
}

/// A message that did not get through a link.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The sender could not write it.
    #[error("message could not be encoded: {0}")]
    Encode(#[from] PacketError),
    /// The receiver could not read it.
    #[error("message could not be decoded: {0}")]
    Decode(#[from] DecodeError),
    /// Packets that are no transcript, or one that could not be read.
    #[error("transcript: {0}")]
    Transcript(#[from] TranscriptError),
    /// The encoding has no form for this message.
    #[error("compact encoding is for packets only")]
    NoScalar,
}

/// Carries messages: encodes, counts the bytes, decodes. Receivers are fed what comes out, never what went in.
pub trait Link: Send {
    /// A belief packet and its length in bytes.
    ///
    /// # Errors
    /// [`LinkError`].
    fn packet(
        &mut self,
        packet: &BeliefPacket,
        meta: Meta,
        encoding: WireEncoding,
    ) -> Result<(BeliefPacket, usize), LinkError>;

    /// Probabilities of every token in id order, and the message's length in bytes.
    ///
    /// # Errors
    /// [`LinkError`].
    fn dense(
        &mut self,
        probs: &[f32],
        meta: Meta,
        encoding: WireEncoding,
    ) -> Result<(Vec<f32>, usize), LinkError>;

    /// A mixture embedding in the model's dtype, and the message's length in bytes.
    ///
    /// # Errors
    /// [`LinkError`].
    fn embed(
        &mut self,
        values: &[f32],
        meta: Meta,
        scalar: Scalar,
    ) -> Result<(Vec<f32>, usize), LinkError>;

    /// The packets of a latent span, and the length of all of them in bytes. By default one
    /// [`Link::packet`] after another.
    ///
    /// # Errors
    /// [`LinkError`].
    fn transcript(
        &mut self,
        transcript: &Transcript,
        encoding: WireEncoding,
    ) -> Result<(Vec<BeliefPacket>, usize), LinkError> {
        let mut received = Vec::with_capacity(transcript.len());
        let mut bytes = 0;
        for (step, packet) in transcript.iter() {
            let meta = Meta {
                fingerprint: transcript.fingerprint(),
                step,
            };
            let (packet, length) = self.packet(packet, meta, encoding)?;
            received.push(packet);
            bytes += length;
        }
        Ok((received, bytes))
    }
}

/// The wire format of `dlmom-packet`.
#[derive(Debug, Default)]
pub struct Wire {
    buffer: Vec<u8>,
}

impl Link for Wire {
    fn packet(
        &mut self,
        packet: &BeliefPacket,
        meta: Meta,
        encoding: WireEncoding,
    ) -> Result<(BeliefPacket, usize), LinkError> {
        self.buffer.clear();
        let bytes = encode_into(packet, meta, encoding.packet(), &mut self.buffer)?;
        Ok((decode_exact(&self.buffer)?.packet, bytes))
    }

    fn dense(
        &mut self,
        probs: &[f32],
        meta: Meta,
        encoding: WireEncoding,
    ) -> Result<(Vec<f32>, usize), LinkError> {
        let scalar = encoding.scalar().ok_or(LinkError::NoScalar)?;
        self.buffer.clear();
        let bytes = encode_dense_into(probs, meta, scalar, &mut self.buffer)?;
        Ok((decode_dense_exact(&self.buffer)?.probs, bytes))
    }

    fn embed(
        &mut self,
        values: &[f32],
        meta: Meta,
        scalar: Scalar,
    ) -> Result<(Vec<f32>, usize), LinkError> {
        self.buffer.clear();
        let bytes = encode_embed_into(values, scalar, meta, &mut self.buffer)?;
        Ok((decode_embed_exact(&self.buffer)?.values, bytes))
    }

    fn transcript(
        &mut self,
        transcript: &Transcript,
        encoding: WireEncoding,
    ) -> Result<(Vec<BeliefPacket>, usize), LinkError> {
        self.buffer.clear();
        let bytes = transcript.encode_into(encoding.packet(), &mut self.buffer)?;
        let received = Transcript::decode_exact(&self.buffer)?;
        Ok((received.into_packets(), bytes))
    }
}

/// What an agent sends up to consensus in a step, where consensus sees no more than that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Entries of the agent's packet; `None` sends the whole distribution without ids.
    pub k: Option<u32>,
    /// How it is written.
    pub encoding: WireEncoding,
    /// Fingerprint of the vocabulary and step of the sample.
    pub meta: Meta,
}

/// Least mass taken to lie outside a packet: a packet rounds its own to 1 below it.
const LEAST_REST: f64 = 5.960_464_477_539_063e-8; // 2^-24

/// The log-probabilities that a receiver can tell from a packet: the entries as they stand, what is
/// missing from its mass spread evenly over the tokens it does not name.
pub fn expand(packet: &BeliefPacket, out: &mut Vec<f32>) {
    let vocab = packet.vocab() as usize;
    let mass = f64::from(packet.mass()).min(1.0);
    let others = vocab.saturating_sub(packet.k());
    let rest = ((1.0 - mass).max(LEAST_REST) / others.max(1) as f64).ln() as f32;
    out.clear();
    out.resize(vocab, rest);
    for (id, p) in packet.iter() {
        // An entry that underflowed to 0 is as likely as a token that is not named.
        if p > 0.0 {
            out[id as usize] = (f64::from(p) * mass).ln() as f32;
        }
    }
}
