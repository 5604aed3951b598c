//! Rows over threads.

use dlmom_core::{Consensus, Request, RowReadout};
use rayon::ThreadPoolBuildError;
use thiserror::Error;

use crate::attend::{Attention, Misfit, attend};
use crate::hands::{Hands, Helpers};
use crate::logits::Logits;
use crate::row::{Scratch, Task, read_row};
use crate::tier::{Available, Tier};

/// A kernel that cannot be had.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The processor lacks the instructions.
    #[error("this processor has no {tier}")]
    Tier {
        /// What was asked for.
        tier: Tier,
    },
    /// The threads could not be started.
    #[error("the kernel's threads: {0}")]
    Threads(#[from] ThreadPoolBuildError),
}

/// Reads rows on one instruction set and a fixed number of threads. Neither changes a bit of a readout.
#[derive(Debug)]
pub struct Kernel {
    tier: Available,
    helpers: Helpers,
}

impl Default for Kernel {
    /// The caller's thread alone, on the fastest instruction set there is.
    fn default() -> Self {
        Self {
            tier: Available::best(),
            helpers: Helpers::default(),
        }
    }
}

/// Logits of a batch from which on helpers are worth waking.
const WORTH: usize = 1 << 17;

/// One row of a batch.
pub struct Row<'a> {
    /// The experts' logits, each `[V]`.
    pub experts: &'a [Logits<'a>],
    /// Merges them.
    pub consensus: &'a dyn Consensus,
    /// What the readout must hold.
    pub request: Request<'a>,
    /// Filled with the V merged preferences, where they are wanted. After a failed row it holds anything.
    pub preferences: Option<&'a mut Vec<f32>>,
}

impl Kernel {
    /// A kernel on the fastest instruction set there is.
    ///
    /// # Errors
    /// [`KernelError::Threads`] where more than one thread is wanted and they cannot be started.
    pub fn new(threads: usize) -> Result<Self, KernelError> {
        Self::with_tier(Tier::best(), threads)
    }

    /// A kernel on a given instruction set. 0 threads count as 1, which is the caller's own.
    ///
    /// # Errors
    /// [`KernelError::Tier`] where the processor lacks it; [`KernelError::Threads`] as for
    /// [`Kernel::new`].
    pub fn with_tier(tier: Tier, threads: usize) -> Result<Self, KernelError> {
        let tier = Available::new(tier).ok_or(KernelError::Tier { tier })?;
        let helpers = Helpers::new(threads)?;
        Ok(Self { tier, helpers })
    }

    /// Its instruction set.
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.tier.tier()
    }

    /// Threads that work on a batch or a row, the caller's among them.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.hands().count()
    }

    fn hands(&self) -> Hands<'_> {
        Hands::new(self.tier, &self.helpers)
    }

    /// Reads one row, split over the threads: [`dlmom_core::read_row`] with every field of the readout
    /// and every failure, on logits of any type.
    ///
    /// Fused are, for up to 8 experts and without a gate, `ties` of the paper, `mean`, `poe` and `arith`
    /// with weights that are uniform or given, the first three with temperatures too; and one expert
    /// under any operator. All else, `tempered` requests too, is left to the reference itself, on
    /// logits converted to float32.
    ///
    /// Ids, draws, flags and merged preferences are those of the reference to the bit. Entropies and
    /// log-probabilities are within 1e-6 nats of it and probabilities within a part in 10^6, so that in
    /// `per_agent` two tokens whose probabilities are neighbours in float32 may change places.
    ///
    /// `preferences` is filled with the V merged logits, if given; after a failed row it holds anything.
    pub fn read_row(
        &self,
        experts: &[Logits<'_>],
        consensus: &dyn Consensus,
        request: &Request<'_>,
        preferences: Option<&mut Vec<f32>>,
        scratch: &mut Scratch,
        out: &mut RowReadout,
    ) {
        let task = Task {
            experts,
            consensus,
            request,
        };
        read_row(self.hands(), task, preferences, scratch, out);
    }

    /// Softmax attention of one query per row, `[rows, heads, dv]` in float32 into `out`, each row over its own positions.
    ///
    /// A row's bits depend on its own queries, keys and values alone, on every tier and number of threads. A row with a
    /// score that is NaN or `+inf`, or without one above `-inf`, becomes NaN.
    ///
    /// # Errors
    /// [`Misfit`] for sizes and types that do not fit each other, and for a row that sees nothing.
    pub fn attend(&self, call: &Attention<'_>, out: &mut [f32]) -> Result<(), Misfit> {
        attend(self.hands(), call, out)
    }

    /// Reads a batch: a row per thread, or where there are fewer rows than threads, one row after the
    /// other on all of them. Operators are called on any of the threads, several at a time.
    ///
    /// `scratch` grows to one per thread, and `out` becomes as long as `rows`.
    pub fn read_rows(
        &self,
        rows: &mut [Row<'_>],
        scratch: &mut Vec<Scratch>,
        out: &mut Vec<RowReadout>,
    ) {
        let logits = |row: &Row<'_>| row.experts.iter().map(Logits::len).sum::<usize>();
        let hands = if rows.iter().map(logits).sum::<usize>() < WORTH {
            Hands::alone(self.tier)
        } else {
            self.hands()
        };
        let threads = hands.count();
        scratch.resize_with(threads.max(scratch.len()), Scratch::default);
        out.resize_with(rows.len(), RowReadout::default);
        let pairs = rows.iter_mut().zip(&mut *out);
        if pairs.len() >= threads {
            let alone = Hands::alone(self.tier);
            hands.share(&mut scratch[..threads], pairs, |scratch, (row, out)| {
                row.read(alone, scratch, out);
            });
        } else {
            for (row, out) in pairs {
                row.read(hands, &mut scratch[0], out);
            }
        }
    }
}

impl Row<'_> {
    fn read(&mut self, hands: Hands<'_>, scratch: &mut Scratch, out: &mut RowReadout) {
        let task = Task {
            experts: self.experts,
            consensus: self.consensus,
            request: &self.request,
        };
        let preferences = self.preferences.as_deref_mut();
        read_row(hands, task, preferences, scratch, out);
    }
}
