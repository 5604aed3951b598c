//! Agents one after another: what is handed over, when, and that all budgets hold over all of them.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::cell::Cell;

use common::{
    Collect, Fed, ROOM, Recorder, SAMPLED, VOCAB, chain_of, config, fed_packets, fed_tokens, go,
    job, jobs, message, one_model, packets_of, pair, prompt, refused, run_into, sequential, sure,
    through_wire, timeless, timeless_all, with_chain,
};
use dlmom_core::{Gate, Mode, NoiseSpec, Reason, Start};
use dlmom_packet::{
    BeliefPacket, Encoding, Meta, Scalar, decode_dense_exact, decode_embed_exact, dense_len,
    embed_len, encode_dense_into, encode_embed_into, encoded_len,
};
use dlmom_runtime::link::{Link, LinkError, Wire};
use dlmom_runtime::{
    AgentId, Align, Backend, ConfigError, Handoff, Hooks, Job, LaneId, LinkMessage, LinkSpec,
    LoopConfig, MockBackend, ModelId, Outcome, PromptSource, Role, RunError, Stop, Support,
    TopologyError, Trigger, WireEncoding,
};
use proptest::prelude::*;

/// What the last agent's lane should hold after what it was handed: its own thoughts, then its text. The
/// last chosen token is never forwarded.
fn assert_goes_on(held: &[Fed], mut expected: Vec<Fed>, o: &Outcome) {
    expected.extend(fed_tokens(&o.tokens));
    let forwarded = expected.len() - usize::from(o.stop == Stop::Budget);
    assert_eq!(held, &expected[..forwarded]);
}

#[test]
fn the_receiver_is_fed_its_prompt_and_then_the_decoded_transcript() {
    for (wire, encoding) in [
        (WireEncoding::F32, Encoding::F32),
        (WireEncoding::F16, Encoding::F16),
        (WireEncoding::Compact, Encoding::Compact),
    ] {
        let mut cfg = pair(Handoff::Transcript);
        cfg.link.encoding = wire;
        let mut backend = Recorder::hashed(2);
        let run = go(&mut backend, &cfg, vec![job(1, 2)]);
        let o = run.one();
        let packets = packets_of(o);
        assert_eq!((o.handoffs, packets.len()), (1, 6));
        let (carried, bytes) = through_wire(&packets[..3], encoding);
        let giver = [fed_tokens(&prompt(1, 0)), fed_packets(&packets[..3])].concat();
        assert_eq!(backend.last(0), giver);
        let taker = [
            fed_tokens(&prompt(1, 1)),
            fed_packets(&carried),
            fed_packets(&packets[3..]),
        ]
        .concat();
        assert_goes_on(backend.last(1), taker, o);
        let record = &o.handoff_log[0];
        assert_eq!(
            (record.from, record.to, record.payload, record.positions),
            (0, 1, Handoff::Transcript, 3)
        );
        assert_eq!((record.bytes, o.handoff_bytes), (bytes, bytes));
        let (mine, its) = (prompt(1, 0).len() as u32, prompt(1, 1).len() as u32);
        assert_eq!(o.prompt_tokens, [mine, its]);
        let observed = o.trace.as_ref().unwrap().mode.len() as u32;
        // Its prompt, three positions handed over, and all of its decisions but the last.
        assert_eq!(o.forward_tokens, [mine + 3, its + 3 + (observed - 4) - 1]);
    }
}

#[test]
fn a_transcript_of_embeddings_hands_vectors_over_in_the_dtype_of_the_model() {
    for (dtype, scalar) in [("fp32", Scalar::F32), ("bf16", Scalar::Bf16)] {
        let mut cfg = pair(Handoff::Transcript);
        cfg.link.message = LinkMessage::Embed;
        let mut backend = Recorder::new(one_model(MockBackend::hashed(2, VOCAB, 1, ROOM)));
        backend.inner.info_mut().models[0].dtype = dtype.into();
        let run = go(&mut backend, &cfg, vec![job(2, 2)]);
        let o = run.one();
        let mixed = backend.embed(ModelId(0), &packets_of(o)).unwrap();
        let vectors: Vec<Fed> = mixed
            .values
            .chunks_exact(mixed.hidden as usize)
            .map(|row| {
                let mut bytes = Vec::new();
                encode_embed_into(row, scalar, Meta::default(), &mut bytes).unwrap();
                Fed::Embed(decode_embed_exact(&bytes).unwrap().values)
            })
            .collect();
        assert_eq!(vectors.len(), 6);
        let giver = [&fed_tokens(&prompt(2, 0)), &vectors[..3]].concat();
        assert_eq!(backend.last(0), giver);
        let taker = [&fed_tokens(&prompt(2, 1)), &vectors[..]].concat();
        assert_goes_on(backend.last(1), taker, o);
        let record = &o.handoff_log[0];
        let expected = (3, 3 * embed_len(mixed.hidden as usize, scalar) as u64);
        assert_eq!((record.positions, record.bytes), expected);
    }
}

#[test]
fn a_transcript_of_whole_vocabularies_hands_distributions_over() {
    for (wire, scalar) in [
        (WireEncoding::F32, Scalar::F32),
        (WireEncoding::F16, Scalar::F16),
    ] {
        let mut cfg = pair(Handoff::Transcript);
        cfg.k = -1;
        cfg.link.message = LinkMessage::Logits;
        cfg.link.encoding = wire;
        let mut backend = Recorder::hashed(2);
        let run = go(&mut backend, &cfg, vec![job(3, 2)]);
        let o = run.one();
        let sent = |packet: &BeliefPacket| {
            let mut probs = vec![0.0; VOCAB as usize];
            for (id, p) in packet.iter() {
                probs[id as usize] = p;
            }
            let mut bytes = Vec::new();
            encode_dense_into(&probs, Meta::default(), scalar, &mut bytes).unwrap();
            decode_dense_exact(&bytes).unwrap().probs
        };
        let once: Vec<Vec<f32>> = packets_of(o).iter().map(sent).collect();
        assert_eq!(backend.last(0)[prompt(3, 0).len()..], {
            let dense: Vec<Fed> = once[..3].iter().cloned().map(Fed::Dense).collect();
            dense
        });
        // What the giver took in is sent once more.
        let again = |probs: &Vec<f32>| {
            let mut bytes = Vec::new();
            encode_dense_into(probs, Meta::default(), scalar, &mut bytes).unwrap();
            Fed::Dense(decode_dense_exact(&bytes).unwrap().probs)
        };
        let mut taker = fed_tokens(&prompt(3, 1));
        taker.extend(once[..3].iter().map(again));
        taker.extend(once[3..].iter().cloned().map(Fed::Dense));
        assert_goes_on(backend.last(1), taker, o);
        let record = &o.handoff_log[0];
        let expected = (3, 3 * dense_len(VOCAB as usize, scalar) as u64);
        assert_eq!((record.positions, record.bytes), expected);
    }
}

#[test]
fn a_transcript_of_hidden_states_hands_aligned_states_over() {
    let texts: Vec<String> = [Align::Identity, Align::Ridge]
        .into_iter()
        .map(|align| {
            let mut cfg = pair(Handoff::Transcript);
            cfg.link = LinkSpec {
                message: LinkMessage::Hidden,
                align,
                ..LinkSpec::default()
            };
            let mut backend = Recorder::new(one_model(MockBackend::hashed(2, VOCAB, 1, ROOM)));
            let run = go(&mut backend, &cfg, vec![job(0, 2)]);
            let o = run.one();
            assert!(backend.hidden.iter().all(|(_, a, _)| *a == align));
            let lanes: Vec<u32> = backend.hidden.iter().map(|(l, ..)| l.agent.0).collect();
            assert_eq!(lanes, [0, 0, 0, 1, 1, 1], "each agent's own states");
            let states: Vec<Fed> = backend
                .hidden
                .iter()
                .map(|(.., row)| Fed::Embed(row.clone()))
                .collect();
            let taker = [&fed_tokens(&prompt(0, 1)), &states[..]].concat();
            assert_goes_on(backend.last(1), taker, o);
            assert_eq!(o.handoff_log[0].bytes, 3 * embed_len(4, Scalar::F32) as u64);
            // No packet was fed, so none is recorded.
            assert!(o.packets.is_empty() && o.latent_steps == 6);
            o.text.clone()
        })
        .collect();
    assert_ne!(texts[0], texts[1], "the alignment reaches the answer");
}

/// Breaks transcripts alone: every packet's probabilities go to the wrong ids.
struct Shifted(Wire);

impl Link for Shifted {
    fn packet(
        &mut self,
        packet: &BeliefPacket,
        meta: Meta,
        encoding: WireEncoding,
    ) -> Result<(BeliefPacket, usize), LinkError> {
        self.0.packet(packet, meta, encoding)
    }

    fn dense(
        &mut self,
        probs: &[f32],
        meta: Meta,
        encoding: WireEncoding,
    ) -> Result<(Vec<f32>, usize), LinkError> {
        self.0.dense(probs, meta, encoding)
    }

    fn embed(
        &mut self,
        values: &[f32],
        meta: Meta,
        scalar: Scalar,
    ) -> Result<(Vec<f32>, usize), LinkError> {
        self.0.embed(values, meta, scalar)
    }

    fn transcript(
        &mut self,
        transcript: &dlmom_packet::Transcript,
        encoding: WireEncoding,
    ) -> Result<(Vec<BeliefPacket>, usize), LinkError> {
        let (packets, bytes) = self.0.transcript(transcript, encoding)?;
        let shifted = packets.iter().map(shift).collect::<Result<_, _>>()?;
        Ok((shifted, bytes))
    }
}

fn shift(packet: &BeliefPacket) -> Result<BeliefPacket, dlmom_packet::PacketError> {
    BeliefPacket::new(
        packet.ids().iter().map(|id| (id + 1) % VOCAB).collect(),
        packet.probs().to_vec(),
        packet.mass(),
        VOCAB,
    )
}

/// A link that says nothing of transcripts.
struct Plain(Wire);

impl Link for Plain {
    fn packet(
        &mut self,
        packet: &BeliefPacket,
        meta: Meta,
        encoding: WireEncoding,
    ) -> Result<(BeliefPacket, usize), LinkError> {
        self.0.packet(packet, meta, encoding)
    }

    fn dense(
        &mut self,
        probs: &[f32],
        meta: Meta,
        encoding: WireEncoding,
    ) -> Result<(Vec<f32>, usize), LinkError> {
        self.0.dense(probs, meta, encoding)
    }

    fn embed(
        &mut self,
        values: &[f32],
        meta: Meta,
        scalar: Scalar,
    ) -> Result<(Vec<f32>, usize), LinkError> {
        self.0.embed(values, meta, scalar)
    }
}

#[test]
fn a_broken_transcript_codec_changes_what_the_receiver_is_fed_and_nothing_before() {
    let cfg = pair(Handoff::Transcript);
    let with = |link: Option<Box<dyn Link>>| {
        let mut backend = Recorder::hashed(2);
        let hooks = Hooks {
            link,
            ..Hooks::default()
        };
        let configs = std::slice::from_ref(&cfg);
        let run = run_into(
            Collect::default(),
            &mut backend,
            configs,
            hooks,
            vec![job(1, 2)],
        )
        .unwrap();
        (backend, run.one().clone())
    };
    let (right, answer) = with(None);
    let (wrong, other) = with(Some(Box::new(Shifted(Wire::default()))));
    assert_eq!(right.last(0), wrong.last(0));
    let at = prompt(1, 1).len();
    let carried: Vec<BeliefPacket> = packets_of(&answer)[..3]
        .iter()
        .map(|p| shift(p).unwrap())
        .collect();
    assert_eq!(wrong.last(1)[at..at + 3], fed_packets(&carried));
    assert_ne!(answer.text, other.text);

    // Without a transcript of its own, a link sends one packet after another.
    let (plain, same) = with(Some(Box::new(Plain(Wire::default()))));
    assert_eq!(plain.last(1), right.last(1));
    assert_eq!(same.handoff_bytes, 3 * encoded_len(5, Encoding::F32) as u64);
}

/// Agent `a` prints letters that depend on its place and the length of its lane, never an end token.
fn chatty(lane: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]) {
    sure(3 + lane.agent.index() * 7 + positions.len() % 6, out);
}

fn scripted(
    agents: usize,
    script: impl Fn(LaneId, &[Vec<(u32, f32)>], &mut [f32]) + Send + 'static,
) -> Recorder {
    Recorder::new(MockBackend::scripted(
        agents,
        VOCAB,
        1,
        ROOM,
        Box::new(script),
    ))
}

/// A chain that hands over texts, its agents explicit.
fn writers(names: &[&str]) -> LoopConfig {
    with_chain(
        config(Gate::AlwaysExplicit, 0.5),
        sequential(names, Handoff::Text),
    )
}

#[test]
fn notes_go_into_the_last_user_message_in_the_receivers_words() {
    let mut cfg = writers(&["planner", "solver"]);
    chain_of(&mut cfg).roles[1].notes = "{sender} wrote <{notes}>, says {sender}".into();
    let asked = |contents: &[(&str, &str)]| PromptSource::Chat {
        messages: contents.iter().map(|(r, c)| message(r, c)).collect(),
    };
    let text = |text: &str| PromptSource::Text { text: text.into() };
    let cases = [
        (
            asked(&[
                ("system", "rules"),
                ("user", "first"),
                ("assistant", "well"),
                ("user", "ask"),
                ("assistant", "so"),
            ]),
            asked(&[
                ("system", "rules"),
                ("user", "first"),
                ("assistant", "well"),
                ("user", "ask\n\n{}"),
                ("assistant", "so"),
            ]),
        ),
        (
            asked(&[("system", "rules")]),
            asked(&[("system", "rules"), ("user", "{}")]),
        ),
        (text("ask"), text("ask\n\n{}")),
        // Ids stay as they are; the notes behind them are tokenised by themselves.
        (PromptSource::Tokens { ids: vec![4, 5] }, text("\n\n{}")),
    ];
    for (source, expected) in cases {
        let mut backend = scripted(2, chatty);
        let mut one = job(0, 2);
        one.prompts[1] = source.clone();
        let run = go(&mut backend, &cfg, vec![one]);
        let o = run.one();
        let trace = o.trace.as_ref().unwrap();
        let printed: Vec<u32> = trace.token[..12].iter().map(|t| t.unwrap()).collect();
        let notes: String = printed
            .iter()
            .map(|t| char::from(b'a' + *t as u8))
            .collect();
        let notes = format!("planner wrote <{notes}>, says planner");
        let fill = |t: &String| t.replace("{}", &notes);
        let expected = match expected {
            PromptSource::Chat { messages } => PromptSource::Chat {
                messages: messages
                    .iter()
                    .map(|m| message(&m.role, &fill(&m.content)))
                    .collect(),
            },
            PromptSource::Text { text } => PromptSource::Text { text: fill(&text) },
            tokens @ PromptSource::Tokens { .. } => tokens,
        };
        let last = expected;
        assert!(
            backend.encoded.contains(&(ModelId(1), last.clone())),
            "{:?}",
            backend.encoded
        );
        let bare = backend.encode(ModelId(1), &source).unwrap();
        let mut ids = backend.encode(ModelId(1), &last).unwrap();
        if let PromptSource::Tokens { ids: given } = &source {
            ids = [given.clone(), ids].concat();
        }
        let record = &o.handoff_log[0];
        assert_eq!(record.payload, Handoff::Text);
        assert_eq!(record.bytes, notes.len() as u64);
        assert_eq!(record.positions as usize, ids.len() - bare.len());
        assert_eq!(o.prompt_tokens[1] as usize, ids.len());
        assert_eq!(backend.last(1)[..ids.len()], fed_tokens(&ids));
        // Printed by both; the answer is the second agent's alone.
        assert_eq!((o.explicit_tokens, o.tokens.len()), (24, 12));
    }
}

#[test]
fn an_agent_reads_the_notes_of_all_before_it_and_silence_is_no_note() {
    let mut cfg = writers(&["planner", "critic", "solver"]);
    for role in &mut chain_of(&mut cfg).roles {
        role.notes = "{sender}: {notes}".into();
    }
    let mut backend = scripted(3, chatty);
    let mut one = job(0, 3);
    one.prompts = vec![PromptSource::Text { text: "ask".into() }; 3];
    let run = go(&mut backend, &cfg, vec![one.clone()]);
    let of = |agent: u32| -> String {
        run.events
            .iter()
            .filter(|e| e.agent == agent)
            .filter_map(|e| e.token)
            .map(|t| char::from(b'a' + t as u8))
            .collect()
    };
    assert_eq!([of(0).len(), of(1).len(), of(2).len()], [8, 8, 8]);
    let expected = format!("ask\n\nplanner: {}\n\ncritic: {}", of(0), of(1));
    assert_eq!(
        backend.encoded.last(),
        Some(&(ModelId(2), PromptSource::Text { text: expected }))
    );

    // The planner ends at once.
    let mute = |lane: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]| {
        if lane.agent == AgentId(0) {
            sure(0, out);
        } else {
            chatty(lane, positions, out);
        }
    };
    let mut backend = scripted(3, mute);
    let run = go(&mut backend, &cfg, vec![one]);
    let o = run.one();
    let first = &o.handoff_log[0];
    assert_eq!(
        (first.trigger, first.positions, first.bytes),
        (Trigger::Convergence, 0, 0)
    );
    let (_, last) = backend.encoded.last().unwrap();
    let PromptSource::Text { text } = last else {
        panic!("{last:?}")
    };
    assert!(text.starts_with("ask\n\ncritic: "), "{text}");
}

/// Two models with vocabularies of their own.
fn strangers(mut backend: Recorder) -> Recorder {
    let other = &mut backend.inner.info_mut().models[1];
    other.vocab = 31;
    other.rows = 31;
    other.fingerprint = 99;
    other.token_bytes = (0..31).map(|v| vec![b'A' + (v % 26) as u8]).collect();
    backend
}

#[test]
fn texts_pass_between_vocabularies_and_packets_do_not() {
    let mut cfg = writers(&["planner", "solver"]);
    let mut one = job(0, 2);
    one.prompts = vec![PromptSource::Text { text: "ask".into() }; 2];
    let mut backend = strangers(scripted(2, chatty));
    let run = go(&mut backend, &cfg, vec![one.clone()]);
    let o = run.one();
    // 3 + 7 and on: letters of the second vocabulary.
    assert_eq!(o.tokens.len(), 12);
    assert!(
        o.tokens.iter().all(|t| (10..16).contains(t)),
        "{:?}",
        o.tokens
    );
    assert!(o.text.bytes().all(|b| b.is_ascii_uppercase()), "{}", o.text);
    let (_, PromptSource::Text { text }) = backend.encoded.last().unwrap() else {
        panic!("a text was given")
    };
    let notes = text.strip_prefix("ask\n\nNotes of the planner:\n").unwrap();
    assert!(notes.bytes().all(|b| b.is_ascii_lowercase()), "{notes}");

    // Messages of latent steps stay with their agent, so even vectors may be sent.
    cfg.link.message = LinkMessage::Embed;
    cfg.controller.gate = Gate::AlwaysLatent;
    let mut backend = strangers(Recorder::hashed(2));
    assert!(go(&mut backend, &cfg, vec![one]).one().latent_steps > 0);

    for handoff in [Handoff::Transcript, Handoff::Kv] {
        let mut cfg = pair(handoff);
        let error = refused(&mut strangers(Recorder::hashed(2)), &cfg, Hooks::default());
        assert!(matches!(error, RunError::Vocabulary { .. }), "{error}");
        cfg.topology = dlmom_runtime::Topology::Lockstep;
        let error = refused(&mut strangers(Recorder::hashed(2)), &cfg, Hooks::default());
        assert!(matches!(error, RunError::Vocabulary { .. }), "{error}");
    }
}

#[test]
fn vectors_are_handed_over_between_agents_of_one_model_only() {
    let mut cfg = pair(Handoff::Transcript);
    for message in [LinkMessage::Embed, LinkMessage::Hidden] {
        cfg.link.message = message;
        let error = refused(&mut Recorder::hashed(2), &cfg, Hooks::default());
        let RunError::VectorLink {
            message: name,
            a,
            b,
        } = &error
        else {
            panic!("{error}")
        };
        assert_eq!((*name, &**a, &**b), (message.as_str(), "mock-0", "mock-1"));
    }
    // Hidden states are of one agent at a time.
    cfg.topology = dlmom_runtime::Topology::Lockstep;
    let mut shared = one_model(MockBackend::hashed(2, VOCAB, 1, ROOM));
    let error = refused(&mut shared, &cfg, Hooks::default());
    assert!(matches!(error, RunError::Config(ConfigError::HiddenLink)));
    let mut alone = MockBackend::hashed(1, VOCAB, 1, ROOM);
    go(&mut alone, &cfg, jobs(2, 1));
    // Consensus has nothing to see in them.
    cfg.link.support = Support::Packet;
    let error = refused(&mut alone, &cfg, Hooks::default());
    assert!(matches!(error, RunError::Config(ConfigError::HiddenLink)));
}

#[test]
fn a_cache_handed_over_is_the_donors_and_the_prompt_follows_it() {
    let cfg = pair(Handoff::Kv);
    let mut backend = Recorder::new(one_model(MockBackend::hashed(2, VOCAB, 1, ROOM)));
    let run = go(&mut backend, &cfg, vec![job(3, 2)]);
    let o = run.one();
    let packets = packets_of(o);
    let giver = [fed_tokens(&prompt(3, 0)), fed_packets(&packets[..3])].concat();
    assert_eq!(backend.last(0), giver);
    let taker = [
        giver.clone(),
        fed_tokens(&prompt(3, 1)),
        fed_packets(&packets[3..]),
    ]
    .concat();
    assert_goes_on(backend.last(1), taker, o);
    let lane = |agent| LaneId {
        slot: dlmom_runtime::SlotId(0),
        agent: AgentId(agent),
    };
    assert_eq!(backend.forks, [(lane(0), lane(1), None)]);
    let record = &o.handoff_log[0];
    let held = giver.len() as u32;
    assert_eq!((record.payload, record.positions), (Handoff::Kv, held));
    assert_eq!(record.bytes, u64::from(held) * 4 * 8);
    // What was copied is not forwarded again.
    assert_eq!(o.forward_tokens[1], backend.forwarded[&lane(1)]);
    assert_eq!(
        o.forward_tokens[1] as usize,
        backend.last(1).len() - giver.len()
    );
}

#[test]
fn caches_do_not_pass_between_models_and_the_difference_is_named() {
    let reasons: Vec<String> = ["", "architecture", "hidden", "kv", "fingerprint", "dtype"]
        .into_iter()
        .map(|what| {
            let mut mock = MockBackend::hashed(2, VOCAB, 1, ROOM);
            let other = &mut mock.info_mut().models[1];
            match what {
                "architecture" => other.architecture = "Other".into(),
                "hidden" => other.hidden = 6,
                "kv" => other.kv_bytes_per_position = 64,
                "fingerprint" => other.fingerprint = 99,
                "dtype" => other.dtype = "bf16".into(),
                _ => {}
            }
            let mut cfg = pair(Handoff::Kv);
            // Vocabularies are told apart before caches are.
            let error = refused(&mut mock, &cfg, Hooks::default());
            assert_eq!(
                matches!(error, RunError::Vocabulary { .. }),
                what == "fingerprint"
            );
            let reason = chain_of(&mut cfg).check_kv(mock.info()).unwrap_err();
            if what != "fingerprint" {
                assert_eq!(error.to_string(), reason.to_string());
            }
            // Nothing else stands in the way.
            chain_of(&mut cfg).handoff = Handoff::Text;
            go(&mut mock, &cfg, jobs(1, 2));
            reason.to_string()
        })
        .collect();
    insta::assert_snapshot!(reasons.join("\n"), @r"
    handoff: kv from mock-0 to mock-1: other weights; a cache means something to the weights that made it alone
    handoff: kv from mock-0 to mock-1: architecture Mock is not Other
    handoff: kv from mock-0 to mock-1: width 4 is not 6
    handoff: kv from mock-0 to mock-1: bytes of KV per position 32 is not 64
    handoff: kv from mock-0 to mock-1: vocabulary 0000000000000017 is not 0000000000000063
    handoff: kv from mock-0 to mock-1: dtype fp32 is not bf16
    ");
}

#[test]
fn a_failing_agent_that_takes_over_from_itself_goes_on_in_its_cache() {
    let mut cfg = pair(Handoff::Kv);
    cfg.controller.gate = Gate::Threshold;
    let chain = chain_of(&mut cfg);
    chain.max_handoffs = Some(2);
    chain.on_failure = Some(1);
    let mut backend = scripted(2, speaks_twice);
    backend.inner = one_model(std::mem::replace(
        &mut backend.inner,
        MockBackend::hashed(1, VOCAB, 1, ROOM),
    ));
    let asked = Cell::new(0);
    let sink = Collect::judging(move |_| asked.replace(asked.get() + 1) > 0);
    let run = run_into(
        sink,
        &mut backend,
        &[cfg],
        Hooks::default(),
        vec![job(0, 2)],
    )
    .unwrap();
    let o = run.one();
    assert_eq!((o.stop, o.handoffs), (Stop::Eos, 2));
    let packets = packets_of(o);
    let held = [
        fed_tokens(&prompt(0, 0)),
        fed_packets(&packets),
        fed_tokens(&prompt(0, 1)),
        fed_tokens(&[5, 5]),
        fed_tokens(&prompt(0, 1)),
        fed_tokens(&[5, 5]),
    ]
    .concat();
    assert_eq!(backend.last(1), held);
    assert_eq!(backend.forks.len(), 1, "its own cache is not copied");
    let second = &o.handoff_log[1];
    assert_eq!((second.from, second.to), (1, 1));
    let before = (held.len() - prompt(0, 1).len() - 2) as u32;
    assert_eq!(second.positions, before);
}

#[test]
fn what_is_handed_over_has_to_fit_the_receivers_lane() {
    for (handoff, says) in [
        (
            Handoff::Kv,
            "a cache of 6 positions and a prompt of 20 tokens",
        ),
        (
            Handoff::Transcript,
            "a prompt of 20 tokens and 3 positions handed over",
        ),
    ] {
        let cfg = pair(handoff);
        let mut one = job(0, 2);
        one.prompts[1] = PromptSource::Tokens { ids: vec![3; 20] };
        let make = |room| Recorder::new(one_model(MockBackend::hashed(2, VOCAB, 1, room)));
        let extra = if handoff == Handoff::Kv { 6 } else { 3 };
        let run = go(&mut make(20 + extra - 1), &cfg, vec![one.clone()]);
        let o = run.one();
        assert_eq!(o.stop, Stop::Context, "{:?}", o.error);
        assert!(o.error.as_ref().unwrap().contains(says), "{:?}", o.error);
        // One position more is enough to begin.
        let run = go(&mut make(20 + extra), &cfg, vec![one]);
        assert_eq!((run.one().stop, &run.one().error), (Stop::Context, &None));
        let carried = if handoff == Handoff::Kv { 0 } else { 3 };
        assert_eq!(run.one().forward_tokens[1], 20 + carried);
    }
    let mut one = job(0, 2);
    one.prompts[1] = PromptSource::Tokens { ids: vec![3; 40] };
    let run = go(
        &mut MockBackend::hashed(2, VOCAB, 1, 30),
        &pair(Handoff::Transcript),
        vec![one],
    );
    assert_eq!(run.one().stop, Stop::Prompt, "{:?}", run.one().error);
}

/// The first agent is unsure for ever; the second prints two letters and ends.
fn speaks_twice(lane: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]) {
    let five = vec![(5, 1.0)];
    if lane.agent == AgentId(0) {
        out.fill(0.0);
        out[0] = -2.0;
    } else if positions.ends_with(&[five.clone(), five]) {
        sure(0, out);
    } else {
        sure(5, out);
    }
}

/// Checks a handoff where it is reported: in the log, in the trace, and in whose steps they are.
fn assert_traced(o: &Outcome) {
    let trace = o.trace.as_ref().unwrap();
    assert_eq!(trace.handoffs, o.handoff_log);
    assert_eq!(o.handoff_log.len() as u32, o.handoffs);
    assert_eq!(
        o.handoff_bytes,
        o.handoff_log.iter().map(|r| r.bytes).sum::<u64>()
    );
    let mut current = 0;
    for (step, &agent) in trace.agent.iter().enumerate() {
        assert_eq!(agent, current, "step {step}");
        if let Some(record) = o.handoff_log.iter().find(|r| r.step == step as u32) {
            assert_eq!(record.from, current);
            current = record.to;
        }
    }
    assert!(
        o.handoff_log
            .iter()
            .all(|r| (r.step as usize) < trace.agent.len())
    );
}

#[test]
fn a_spent_latent_budget_hands_over() {
    let o = go(
        &mut MockBackend::hashed(2, VOCAB, 1, ROOM),
        &pair(Handoff::Transcript),
        vec![job(1, 2)],
    )
    .one()
    .clone();
    assert_traced(&o);
    let record = &o.handoff_log[0];
    assert_eq!((record.trigger, record.step), (Trigger::LatentBudget, 3));
    let trace = o.trace.unwrap();
    assert_eq!(trace.reason[3], Reason::LatentBudget);
    // Nothing is printed in the step that hands over.
    assert_eq!(trace.token[3], None);
    assert_eq!((o.latent_steps, &o.latent_segments[..]), (6, &[3, 3][..]));
}

#[test]
fn an_agent_that_has_thought_enough_hands_over() {
    // Unsure at first, then sure of a letter, or of the end.
    for (token, reason) in [(5, Reason::BelowAlpha), (0, Reason::EosCertain)] {
        let script = move |lane: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]| {
            out.fill(0.0);
            if lane.agent == AgentId(1) || positions.len() >= 5 {
                sure(token, out);
            }
        };
        let mut cfg = pair(Handoff::Transcript);
        cfg.controller.gate = Gate::Threshold;
        // The prompt has 3 tokens.
        let run = go(&mut scripted(2, script), &cfg, vec![job(0, 2)]);
        let o = run.one();
        assert_traced(o);
        let record = &o.handoff_log[0];
        assert_eq!(
            (record.trigger, record.step, record.positions),
            (Trigger::Convergence, 2, 2)
        );
        assert_eq!(o.trace.as_ref().unwrap().reason[2], reason);
        assert_eq!(run.handoffs[0].1, *record);
    }
}

#[test]
fn a_spent_share_of_the_steps_hands_over() {
    let run = go(
        &mut scripted(3, chatty),
        &writers(&["planner", "critic", "solver"]),
        vec![job(0, 3)],
    );
    let o = run.one();
    assert_traced(o);
    let log: Vec<_> = o.handoff_log.iter().map(|r| (r.trigger, r.step)).collect();
    // A third of 24 each.
    assert_eq!(log, [(Trigger::StepBudget, 7), (Trigger::StepBudget, 15)]);
    assert_eq!(o.trace.as_ref().unwrap().agent, {
        let mut agents = vec![0; 8];
        agents.extend([1; 8]);
        agents.extend([2; 8]);
        agents
    });
}

#[test]
fn a_stretch_that_a_handoff_ends_is_a_stretch_of_its_own() {
    let mut cfg = with_chain(
        config(Gate::AlwaysLatent, 0.5),
        sequential(&["planner", "solver"], Handoff::Text),
    );
    cfg.controller.max_latent_steps = 40;
    cfg.max_steps = 12;
    let mut backend = scripted(2, chatty);
    let run = go(&mut backend, &cfg, vec![job(1, 2)]);
    let o = run.one();
    assert_traced(o);
    // Half of the steps each; the planner has written nothing when its half is over.
    let record = &o.handoff_log[0];
    assert_eq!(
        (record.trigger, record.step, record.bytes),
        (Trigger::StepBudget, 5, 0)
    );
    assert_eq!((&o.latent_segments[..], o.switches), (&[6, 2][..], 1));

    cfg.controls.drop_latent = true;
    let mut backend = scripted(2, chatty);
    let run = go(&mut backend, &cfg, vec![job(1, 2)]);
    let answer = &run.one().tokens;
    let kept = [
        fed_tokens(&prompt(1, 1)),
        fed_tokens(&answer[..answer.len() - 1]),
    ]
    .concat();
    assert_eq!(backend.last(1), kept);
}

#[test]
fn what_is_kept_for_the_answer_is_kept_from_silent_agents_too() {
    for handoff in [Handoff::Transcript, Handoff::Kv] {
        let mut cfg = pair(handoff);
        cfg.max_steps = 10;
        cfg.controller.max_latent_steps = 40;
        let mut mock = MockBackend::scripted(2, VOCAB, 1, ROOM, Box::new(chatty));
        mock = one_model(mock);
        let run = go(&mut mock, &cfg, vec![job(0, 2)]);
        let o = run.one();
        assert_traced(o);
        let record = &o.handoff_log[0];
        assert_eq!((record.trigger, record.step), (Trigger::StepBudget, 6));
        let trace = o.trace.as_ref().unwrap();
        assert_eq!(trace.reason[6], Reason::AnswerReserve);
        assert_eq!((o.latent_steps, o.explicit_tokens), (6, 4));
        assert_eq!(o.stop, Stop::Budget);
    }
}

/// Threshold gate, three handoffs, failures go back to the first agent.
fn retrying() -> LoopConfig {
    let mut cfg = pair(Handoff::Transcript);
    cfg.controller.gate = Gate::Threshold;
    let chain = chain_of(&mut cfg);
    chain.max_handoffs = Some(3);
    chain.on_failure = Some(0);
    cfg
}

#[test]
fn a_failure_hands_control_back_with_all_that_was_thought_and_printed() {
    let mut backend = scripted(2, speaks_twice);
    let asked = Cell::new(0);
    let sink = Collect::judging(move |_| asked.replace(asked.get() + 1) == 1);
    let configs = [retrying()];
    let run = run_into(
        sink,
        &mut backend,
        &configs,
        Hooks::default(),
        vec![job(0, 2)],
    )
    .unwrap();
    let o = run.one();
    assert_traced(o);
    let log: Vec<_> = o
        .handoff_log
        .iter()
        .map(|r| (r.from, r.to, r.trigger, r.positions))
        .collect();
    // Half of 6 latent steps, then half of the 3 that are left.
    assert_eq!(
        log,
        [
            (0, 1, Trigger::LatentBudget, 3),
            (1, 0, Trigger::Failure, 5),
            (0, 1, Trigger::LatentBudget, 7),
        ]
    );
    assert_eq!(o.stop, Stop::Eos);
    assert_eq!((&o.text[..], &o.tokens[..]), ("ff", &[5, 5][..]));
    assert_eq!(o.explicit_tokens, 4, "printed tokens of all visits");
    assert_eq!(run.asked, ["ff", "ff"]);
    let packets = packets_of(o);
    let printed = BeliefPacket::one_hot(5, VOCAB).unwrap();
    let back = [
        fed_tokens(&prompt(0, 0)),
        fed_packets(&packets[..3]),
        fed_packets([&printed, &printed]),
        fed_packets(&packets[3..]),
    ]
    .concat();
    assert_eq!(backend.last(0), back);
    assert_eq!(backend.all(0).len(), 2, "its first lane was forgotten");
    // Its prompt is read once a visit.
    let (mine, its) = (prompt(0, 0).len() as u32, prompt(0, 1).len() as u32);
    assert_eq!(o.prompt_tokens, [2 * mine, 2 * its]);
    let forwarded = |agent: u32| {
        backend
            .all(agent)
            .iter()
            .map(|held| held.len() as u32)
            .sum::<u32>()
    };
    assert_eq!(o.forward_tokens, [forwarded(0), forwarded(1)]);
}

#[test]
fn without_a_handoff_left_a_sample_without_an_answer_says_so() {
    for (limit, says) in [
        (
            Some(3),
            "specialist gave no answer, and 3 of 3 handoffs are used",
        ),
        (
            None,
            "specialist gave no answer, and 1 of 1 handoffs are used",
        ),
        (
            Some(0),
            "generalist gave no answer, and 0 of 0 handoffs are used",
        ),
    ] {
        let mut cfg = retrying();
        chain_of(&mut cfg).max_handoffs = limit;
        if limit == Some(0) {
            // The first agent would print to the last step, and that is a budget spent.
            cfg.controller.gate = Gate::AlwaysExplicit;
        }
        let script = move |lane: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]| {
            let lane = match limit {
                Some(0) => LaneId {
                    agent: AgentId(1),
                    ..lane
                },
                _ => lane,
            };
            speaks_twice(lane, positions, out);
        };
        let run = run_into(
            Collect::judging(|_| false),
            &mut scripted(2, script),
            &[cfg],
            Hooks::default(),
            vec![job(0, 2)],
        )
        .unwrap();
        let o = run.one();
        assert_eq!((o.stop, &o.text[..]), (Stop::Handoffs, "ff"));
        assert_eq!(o.error.as_deref(), Some(says));
        assert_eq!(o.handoffs, limit.unwrap_or(1));
    }
    // Without anyone to take over, nobody is asked.
    let mut cfg = retrying();
    chain_of(&mut cfg).on_failure = None;
    let run = run_into(
        Collect::judging(|_| panic!("asked")),
        &mut scripted(2, speaks_twice),
        &[cfg],
        Hooks::default(),
        vec![job(0, 2)],
    )
    .unwrap();
    assert_eq!((run.one().stop, run.one().handoffs), (Stop::Eos, 1));
}

#[test]
fn an_answering_agent_leaves_half_of_the_steps_to_the_one_that_could_take_over() {
    let mut cfg = retrying();
    chain_of(&mut cfg).max_handoffs = Some(2);
    // The second agent never ends by itself.
    let script = |lane: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]| {
        if lane.agent == AgentId(0) {
            speaks_twice(lane, positions, out);
        } else {
            sure(5, out);
        }
    };
    let run = run_into(
        Collect::judging(|_| false),
        &mut scripted(2, script),
        &[cfg],
        Hooks::default(),
        vec![job(0, 2)],
    )
    .unwrap();
    let o = run.one();
    assert_traced(o);
    let failure = &o.handoff_log[1];
    // 3 steps before it and a handoff, half of the 21 left, rounded up.
    assert_eq!((failure.trigger, failure.step), (Trigger::Failure, 3 + 11));
    // No handoff is left: the first agent answers, to the last step.
    assert_eq!((o.stop, o.total_steps()), (Stop::Budget, 24));
    assert_eq!(o.trace.as_ref().unwrap().agent.last(), Some(&0));
}

#[test]
fn without_handoffs_the_first_agent_answers_as_if_alone() {
    for handoff in [Handoff::Transcript, Handoff::Text, Handoff::Kv] {
        let mut cfg = pair(handoff);
        chain_of(&mut cfg).max_handoffs = Some(0);
        cfg.sampling = SAMPLED;
        let mut mock = one_model(MockBackend::hashed(2, VOCAB, 1, ROOM));
        let chained = go(&mut mock, &cfg, jobs(5, 2)).outcomes;
        cfg.topology = dlmom_runtime::Topology::Lockstep;
        let lone = go(
            &mut MockBackend::hashed(1, VOCAB, 1, ROOM),
            &cfg,
            jobs(5, 1),
        )
        .outcomes;
        for (a, b) in chained.iter().zip(&lone) {
            let mut expected = timeless(b);
            expected.prompt_tokens.push(0);
            expected.forward_tokens.push(0);
            assert_eq!(timeless(a), expected);
            assert_eq!(a.latent_steps, 6);
        }
    }
}

#[test]
fn a_chain_is_cut_short_where_handoffs_run_out() {
    let mut cfg = with_chain(
        config(Gate::AlwaysLatent, 0.5),
        sequential(&["a", "b", "c"], Handoff::Transcript),
    );
    let run = |cfg: &LoopConfig| {
        go(
            &mut MockBackend::hashed(3, VOCAB, 1, ROOM),
            cfg,
            vec![job(1, 3)],
        )
        .one()
        .clone()
    };
    let whole = run(&cfg);
    let to = |o: &Outcome| o.handoff_log.iter().map(|r| r.to).collect::<Vec<_>>();
    assert_eq!(
        (to(&whole), &whole.latent_segments[..]),
        (vec![1, 2], &[2, 2, 2][..])
    );
    // The third agent is handed what both before it thought.
    assert_eq!(whole.handoff_log[1].positions, 4);

    chain_of(&mut cfg).max_handoffs = Some(1);
    let cut = run(&cfg);
    assert_eq!(to(&cut), [1]);
    assert_eq!(cut.prompt_tokens[2], 0);
    assert_eq!(cut.trace.as_ref().unwrap().agent.last(), Some(&1));
    // Shares are those of the agents that will act.
    assert_eq!(cut.latent_segments, [3, 3]);

    let writing = |limit| {
        let mut cfg = writers(&["a", "b", "c"]);
        chain_of(&mut cfg).max_handoffs = limit;
        let run = go(&mut scripted(3, chatty), &cfg, vec![job(0, 3)]);
        let steps: Vec<u32> = run.one().handoff_log.iter().map(|r| r.step).collect();
        steps
    };
    assert_eq!(writing(None), [7, 15]);
    assert_eq!(writing(Some(1)), [11]);
}

#[test]
fn a_role_may_say_how_long_it_thinks() {
    for (given, segments) in [
        (None, vec![3, 3]),
        (Some(1), vec![1, 5]),
        (Some(100), vec![6]),
        (Some(0), vec![6]),
    ] {
        let mut cfg = pair(Handoff::Transcript);
        chain_of(&mut cfg).roles[0].latent_steps = given;
        let run = go(
            &mut MockBackend::hashed(2, VOCAB, 1, ROOM),
            &cfg,
            vec![job(1, 2)],
        );
        let o = run.one();
        assert_eq!(o.latent_segments, segments);
        let first = given.unwrap_or(3).min(6);
        assert_eq!((o.handoffs, o.handoff_log[0].positions), (1, first));
        if first == 0 {
            assert_eq!(o.handoff_log[0].bytes, 0, "nothing is sent");
        }
    }
    // The one that answers has what is left, or what it says; 0 prints from the start, whatever was left over.
    for (given, segments) in [
        (None, vec![1, 5]),
        (Some(2), vec![1, 2]),
        (Some(100), vec![1, 5]),
        (Some(0), vec![1]),
    ] {
        let mut cfg = pair(Handoff::Transcript);
        chain_of(&mut cfg).roles[0].latent_steps = Some(1);
        chain_of(&mut cfg).roles[1].latent_steps = given;
        let mut mock = MockBackend::hashed(2, VOCAB, 1, ROOM);
        let run = go(&mut mock, &cfg, vec![job(1, 2)]);
        let o = run.one();
        assert_eq!(o.latent_segments, segments);
        assert_eq!((o.handoffs, o.explicit_tokens > 0), (1, true));
        assert_traced(o);
    }
}

#[test]
fn chains_that_cannot_be_run_are_refused() {
    let said = |agents: usize, change: &dyn Fn(&mut LoopConfig)| {
        let mut cfg = pair(Handoff::Transcript);
        change(&mut cfg);
        let mut mock = MockBackend::hashed(agents, VOCAB, 1, ROOM);
        match refused(&mut mock, &cfg, Hooks::default()) {
            RunError::Config(ConfigError::Topology(error)) => error,
            other => panic!("{other}"),
        }
    };
    assert_eq!(
        said(3, &|_| {}),
        TopologyError::Roles {
            roles: 2,
            agents: 3
        }
    );
    assert_eq!(
        said(1, &|cfg| {
            chain_of(cfg).roles.pop();
        }),
        TopologyError::Short
    );
    for name in ["generalist", " "] {
        let error = said(2, &|cfg| chain_of(cfg).roles[1] = Role::named(name));
        let name = name.to_owned();
        assert_eq!(error, TopologyError::Name { place: 1, name });
    }
    assert_eq!(
        said(2, &|cfg| chain_of(cfg).on_failure = Some(2)),
        TopologyError::OnFailure {
            place: 2,
            agents: 2
        }
    );
}

#[test]
fn a_session_says_whose_step_it_is_and_when_control_passes() {
    let cfg = pair(Handoff::Transcript);
    let mut mock = MockBackend::hashed(2, VOCAB, 1, ROOM);
    let run = go(&mut mock, &cfg, vec![job(1, 2)]);
    let o = run.one();
    let before: Vec<&str> = vec!["step"; 4];
    assert_eq!(run.order[..4], before);
    assert_eq!(run.order[4], "handoff");
    assert_eq!(run.order.last(), Some(&"finished"));
    assert_eq!(run.order.iter().filter(|o| **o == "handoff").count(), 1);
    assert_eq!(run.handoffs, [(o.key.clone(), o.handoff_log[0].clone())]);
    let trace = o.trace.as_ref().unwrap();
    let agents: Vec<u32> = run.events.iter().map(|e| e.agent).collect();
    assert_eq!(agents, trace.agent);
    for event in &run.events {
        assert_eq!(event.model, format!("mock-{}", event.agent));
        assert_eq!(event.read.entropies.len(), 1, "one agent moves at a time");
    }
    // The step that hands over prints nothing and sends nothing down.
    let over = &run.events[3];
    assert_eq!((over.token, over.bytes), (None, (u64::from(VOCAB) * 4, 0)));
    assert!(o.agreement.is_none() && o.merge_rate.is_none());
}

fn batched(cfg: &LoopConfig, slots: u32, jobs: Vec<Job>) -> Vec<Outcome> {
    let mut mock = one_model(MockBackend::hashed(3, VOCAB, slots, ROOM));
    // Whether a text answers is a function of the text.
    let sink = Collect::judging(|text| text.len() % 3 == 0);
    let configs = std::slice::from_ref(cfg);
    let run = run_into(sink, &mut mock, configs, Hooks::default(), jobs).unwrap();
    timeless_all(&run.outcomes)
}

#[test]
fn a_chains_sample_is_the_same_alone_in_a_batch_in_any_order_and_after_refill() {
    for handoff in [Handoff::Transcript, Handoff::Text, Handoff::Kv] {
        let mut cfg = with_chain(
            config(Gate::Threshold, 0.45),
            sequential(&["a", "b", "c"], handoff),
        );
        cfg.noise = NoiseSpec::Gumbel { tau: 1.0 };
        cfg.sampling = SAMPLED;
        let chain = chain_of(&mut cfg);
        chain.max_handoffs = Some(5);
        chain.on_failure = Some(1);
        let alone = batched(&cfg, 1, jobs(17, 3));
        assert_eq!(alone, batched(&cfg, 4, jobs(17, 3)));
        let reversed = jobs(17, 3).into_iter().rev().collect();
        assert_eq!(alone, batched(&cfg, 7, reversed));
        assert_eq!(alone.len(), 17);
        let triggers: std::collections::BTreeSet<&str> = alone
            .iter()
            .flat_map(|o| &o.handoff_log)
            .map(|r| r.trigger.as_str())
            .collect();
        assert!(
            triggers.contains("failure") && triggers.len() > 1,
            "{triggers:?}"
        );
        assert!(alone.iter().any(|o| o.latent_steps > 0));
    }
}

fn any_gate() -> impl Strategy<Value = Gate> {
    prop::sample::select(vec![
        Gate::Threshold,
        Gate::Trend,
        Gate::Reference,
        Gate::LatentThenExplicit,
        Gate::AlwaysLatent,
        Gate::AlwaysExplicit,
    ])
}

fn any_handoff() -> impl Strategy<Value = Handoff> {
    prop::sample::select(vec![Handoff::Transcript, Handoff::Text, Handoff::Kv])
}

/// Switches of a trace: changes of mode within a visit.
fn switches_of(o: &Outcome) -> u32 {
    let trace = o.trace.as_ref().unwrap();
    let handed = |step: usize| o.handoff_log.iter().any(|r| r.step as usize == step);
    let changes = trace.mode.windows(2).enumerate();
    changes
        .filter(|(at, pair)| pair[0] != pair[1] && !handed(*at))
        .count() as u32
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(160))]

    #[test]
    fn budgets_hold_over_all_visits_together(
        gate in any_gate(),
        alpha in 0.2_f64..0.95,
        cap in -1_i64..6,
        max_latent in 0_u32..16,
        (max_steps, reserve) in (1_u32..30).prop_flat_map(|m| (Just(m), 0..=m.min(6))),
        handoff in any_handoff(),
        agents in 2_usize..5,
        limit in prop::option::of(0_u32..6),
        back in prop::option::of(0_u32..2),
        answers in 1_usize..5,
        latent_start in any::<bool>(),
        (slots, message) in (1_u32..4, prop::sample::select(vec![LinkMessage::Belief, LinkMessage::Embed, LinkMessage::Hidden])),
    ) {
        let mut cfg = config(gate, alpha);
        cfg.controller.cap = cap;
        cfg.controller.max_latent_steps = max_latent;
        cfg.controller.start = if latent_start { Start::Latent } else { Start::Gate };
        cfg.max_steps = max_steps;
        cfg.answer_reserve = reserve;
        cfg.link.message = message;
        let names = ["a", "b", "c", "d"];
        let mut chain = sequential(&names[..agents], handoff);
        chain.max_handoffs = limit;
        chain.on_failure = back;
        let most = chain.limit();
        let cfg = with_chain(cfg, chain);
        let mut backend = Recorder::new(one_model(MockBackend::hashed(agents, VOCAB, slots, 400)));
        let sink = Collect::judging(move |text| text.len() % answers == 0);
        let jobs = jobs(4, agents as u32);
        let run = run_into(sink, &mut backend, &[cfg], Hooks::default(), jobs).unwrap();
        prop_assert_eq!(run.outcomes.len(), 4);
        let mut forwarded = 0;
        for o in &run.outcomes {
            prop_assert!(matches!(o.stop, Stop::Eos | Stop::Budget | Stop::Handoffs), "{:?}", o.error);
            prop_assert!(cap < 0 || i64::from(o.switches) <= cap, "{} switches", o.switches);
            prop_assert!(cap != 0 || o.latent_steps == 0);
            prop_assert!(o.latent_steps <= max_latent);
            prop_assert!(o.total_steps() <= max_steps);
            prop_assert!(o.handoffs <= most);
            assert_traced(o);
            prop_assert_eq!(o.switches, switches_of(o));
            prop_assert_eq!(o.latent_segments.iter().sum::<u32>(), o.latent_steps);
            let trace = o.trace.as_ref().unwrap();
            let latent = trace.mode.iter().filter(|m| **m == Mode::Latent).count() as u32;
            let printed = trace.token.iter().flatten().count() as u32;
            prop_assert_eq!((latent, printed), (o.latent_steps, o.explicit_tokens));
            if handoff != Handoff::Text {
                // The last steps are for the answer, whoever has control.
                let mut taken = 0;
                for (mode, token) in trace.mode.iter().zip(&trace.token) {
                    prop_assert!(*mode == Mode::Explicit || taken + reserve < max_steps);
                    taken += u32::from(*mode == Mode::Latent || token.is_some());
                }
            }
            let (up, down) = run
                .events
                .iter()
                .filter(|e| e.item == o.key.item_id)
                .fold((0, 0), |(up, down), e| (up + e.bytes.0, down + e.bytes.1));
            prop_assert_eq!((up, down), (o.uplink_bytes, o.downlink_bytes));
            let records = run.handoffs.iter().filter(|(key, _)| *key == o.key);
            let records: Vec<_> = records.map(|(_, record)| record.clone()).collect();
            prop_assert_eq!(&records, &o.handoff_log);
            forwarded += o.forward_tokens.iter().sum::<u32>();
        }
        prop_assert_eq!(forwarded, backend.forwarded.values().sum::<u32>());
    }
}
