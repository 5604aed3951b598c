//! Controls: what takes the place of a packet or of a transcript, to see whether its content matters.

use dlmom_core::{NoiseError, Purpose, Stream, noise};
use dlmom_packet::{BeliefPacket, PacketError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is fed in a latent step in place of the packet (suite C1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PacketControl {
    /// The packet itself.
    #[default]
    Real,
    /// Its tokens, all equally probable.
    Uniform,
    /// The mean embedding of the vocabulary: a filler that says nothing.
    Filler,
    /// A packet of another item, recorded on a pilot of the reference pipeline.
    Other,
    /// Its probabilities, dealt to its tokens anew.
    Shuffle,
    /// Its most probable token alone.
    Top1,
    /// The packet moved in a random direction, as far (in KL) as its most probable token alone is.
    EqualNoise,
}

impl PacketControl {
    /// Whether packets of other items are needed.
    #[must_use]
    pub fn needs_donors(self) -> bool {
        self == Self::Other
    }
}

/// What is handed over in place of the transcript (suite C2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HandoffControl {
    /// The transcript itself.
    #[default]
    Real,
    /// As many zero vectors.
    Zero,
    /// Its messages in another order.
    Shuffle,
    /// The transcript of another item, recorded on a pilot of the reference pipeline.
    Other,
    /// Nothing: the handoff happens and hands over no position.
    None,
}

/// The controls of a configuration; all off by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Controls {
    /// What is fed in latent steps.
    pub packet: PacketControl,
    /// What is handed over.
    pub handoff: HandoffControl,
    /// Modes are those of the reference pipeline's sample, step by step, whatever the entropies.
    pub same_exits: bool,
    /// A latent stretch is cut out of every lane when it ends: the next token follows what was there
    /// before it.
    pub drop_latent: bool,
}

impl Controls {
    /// Whether a draw enters, so that seeds matter.
    #[must_use]
    pub fn draws(&self) -> bool {
        matches!(
            self.packet,
            PacketControl::Other | PacketControl::Shuffle | PacketControl::EqualNoise
        ) || matches!(
            self.handoff,
            HandoffControl::Shuffle | HandoffControl::Other
        )
    }

    /// Whether recorded packets of other items are needed.
    #[must_use]
    pub fn needs_donors(&self) -> bool {
        self.packet.needs_donors() || self.handoff == HandoffControl::Other
    }
}

/// The latent packets of one item, in order, as the reference pipeline fed them.
#[derive(Clone, Debug, PartialEq)]
pub struct Donor {
    /// The item.
    pub item_id: String,
    /// Its packets; at least one.
    pub packets: Vec<BeliefPacket>,
}

/// Recorded packets of other items.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Donors {
    donors: Vec<Donor>,
}

impl Donors {
    /// Donors that have packets, in the order given.
    #[must_use]
    pub fn new(donors: Vec<Donor>) -> Self {
        Self {
            donors: donors
                .into_iter()
                .filter(|d| !d.packets.is_empty())
                .collect(),
        }
    }

    /// Whether nobody has anything to give.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.donors.is_empty()
    }

    /// The donors.
    pub fn iter(&self) -> std::slice::Iter<'_, Donor> {
        self.donors.iter()
    }

    /// The donor that a sample meets at a step, never the item itself; `None` where there is no other.
    #[must_use]
    pub fn pick(&self, item_id: &str, stream: &Stream) -> Option<&Donor> {
        let others: Vec<&Donor> = self
            .donors
            .iter()
            .filter(|d| d.item_id != item_id)
            .collect();
        let draw = stream.uniform(0, Purpose::Donor, 0);
        let place = ((draw * others.len() as f64) as usize).min(others.len().saturating_sub(1));
        others.get(place).copied()
    }
}

impl<'a> IntoIterator for &'a Donors {
    type Item = &'a Donor;
    type IntoIter = std::slice::Iter<'a, Donor>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Why a control cannot be applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The packet that came out is none.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// The noise of the control.
    #[error(transparent)]
    Noise(#[from] NoiseError),
    /// Nobody to take a packet from.
    #[error("no other item has a latent packet to give")]
    NoDonor,
}

/// What a control made of a packet.
#[derive(Clone, Debug, PartialEq)]
pub struct Controlled {
    /// What is fed.
    pub packet: BeliefPacket,
    /// `KL(fed || packet)` in nats; `None` where the fed packet has tokens that the packet lacks.
    pub kl: Option<f64>,
    /// Their Jensen-Shannon divergence in nats.
    pub js: f64,
}

/// Applies a control to the packet of a latent step, its `step`-th. [`PacketControl::Filler`] is no
/// packet and is left to the caller: the packet comes back as it is.
///
/// # Errors
/// [`ControlError`].
pub fn control(
    control: PacketControl,
    packet: &BeliefPacket,
    item_id: &str,
    latent_step: u32,
    donors: &Donors,
    stream: &Stream,
) -> Result<Controlled, ControlError> {
    let k = packet.k();
    let fed = match control {
        PacketControl::Real | PacketControl::Filler => packet.clone(),
        PacketControl::Uniform => packet.with_probs(vec![1.0 / k as f32; k])?,
        PacketControl::Top1 => BeliefPacket::new(
            vec![packet.top().0],
            vec![1.0],
            packet.mass(),
            packet.vocab(),
        )?,
        PacketControl::Shuffle => {
            // Ids in the order of their draws; the probabilities stay where they are.
            let mut ids = packet.ids().to_vec();
            ids.sort_by_cached_key(|&id| (stream.bits(u64::from(id), Purpose::Shuffle, 0)[0], id));
            BeliefPacket::new(ids, packet.probs().to_vec(), packet.mass(), packet.vocab())?
        }
        PacketControl::EqualNoise => {
            let moved = noise::tilt(packet.ids(), packet.probs(), stream)?;
            BeliefPacket::new(moved.ids, moved.probs, packet.mass(), packet.vocab())?
        }
        PacketControl::Other => {
            let donor = donors
                .pick(item_id, &first_step(stream))
                .ok_or(ControlError::NoDonor)?;
            donor.packets[latent_step as usize % donor.packets.len()].clone()
        }
    };
    let (kl, js) = divergences(&fed, packet);
    Ok(Controlled {
        packet: fed,
        kl,
        js,
    })
}

/// The stream of a sample's choices that hold for all of its steps.
fn first_step(stream: &Stream) -> Stream {
    Stream { step: 0, ..*stream }
}

/// Jensen-Shannon divergence in nats of a packet and all tokens of its vocabulary, equally probable: of a filler.
pub(crate) fn from_even(packet: &BeliefPacket) -> f64 {
    let even = 1.0 / f64::from(packet.vocab());
    let term = |x: f64, m: f64| if x > 0.0 { 0.5 * x * (x / m).ln() } else { 0.0 };
    let named: f64 = packet
        .iter()
        .map(|(_, p)| {
            let m = 0.5 * (even + f64::from(p));
            term(even, m) + term(f64::from(p), m)
        })
        .sum();
    let others = f64::from(packet.vocab()) - packet.k() as f64;
    (named + others * term(even, 0.5 * even)).max(0.0)
}

/// `KL(a || b)`, where b has every token of a, and the Jensen-Shannon divergence.
pub(crate) fn divergences(a: &BeliefPacket, b: &BeliefPacket) -> (Option<f64>, f64) {
    use std::collections::BTreeMap;
    let mut pairs: BTreeMap<u32, (f64, f64)> = BTreeMap::new();
    for (id, p) in a.iter() {
        pairs.entry(id).or_default().0 = f64::from(p);
    }
    for (id, p) in b.iter() {
        pairs.entry(id).or_default().1 = f64::from(p);
    }
    let term = |x: f64, y: f64| if x > 0.0 { x * (x / y).ln() } else { 0.0 };
    let mut kl = Some(0.0);
    let mut js = 0.0;
    for &(p, q) in pairs.values() {
        kl = kl
            .filter(|_| p == 0.0 || q > 0.0)
            .map(|sum| sum + term(p, q));
        let m = 0.5 * (p + q);
        js += 0.5 * (term(p, m) + term(q, m));
    }
    (kl.map(|x: f64| x.max(0.0)), js.max(0.0))
}

/// The order in which a shuffled transcript of `count` messages is handed over: places in the original.
#[must_use]
pub fn shuffled(count: usize, stream: &Stream) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    let stream = first_step(stream);
    order.sort_by_cached_key(|&at| (stream.bits(at as u64, Purpose::Shuffle, 1)[0], at));
    order
}
