//! The per-sample state machine that decides between latent and explicit steps.

use std::collections::VecDeque;
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::spec::{ControllerSpec, Gate, Start, TriggerSpec};
use crate::validate::SpecError;

/// What the next input is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// A mixture embedding; nothing is printed.
    Latent,
    /// One token, printed and counted.
    Explicit,
}

impl Mode {
    /// The name under which the mode is recorded.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Latent => "latent",
            Self::Explicit => "explicit",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why a decision came out as it did. The names are recorded in traces and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Threshold gate: the entropy is above `alpha`.
    AboveAlpha,
    /// Threshold gate: the entropy is at most `alpha`.
    BelowAlpha,
    /// Trend gate with a window not yet full: the entropy is above `alpha`.
    WarmupAboveAlpha,
    /// Trend gate with a window not yet full: the entropy is at most `alpha`.
    WarmupBelowAlpha,
    /// Trend gate: the entropy is below the convergence threshold.
    Converged,
    /// Trend gate: the entropy falls steadily, with little variance.
    Converging,
    /// Trend gate: the mean is at least `alpha`, or it is above convergence and not falling.
    Uncertain,
    /// Trend gate: neither converging nor uncertain, so the mode stays. Reference gate: the entropy is
    /// not on the other side of the reference.
    Keep,
    /// Reference gate: the entropy is above that of the block's first step.
    AboveReference,
    /// Reference gate: the entropy is below that of the block's first step.
    BelowReference,
    /// One-block gate: the entropy is below `alpha`, but not for long enough yet.
    Patience,
    /// One-block gate: the block has ended.
    NoReturn,
    /// The gate of a control.
    Always,
    /// The first step is latent because the specification says so.
    StartLatent,
    /// The gate wants to switch, but the mode has not lasted its minimum yet.
    Dwell,
    /// The gate wants latent mode, but the switches left cannot pay for entering and leaving it.
    Cap,
    /// The latent budget is spent: explicit for good.
    LatentBudget,
    /// Forced: the latent step is certain of the end of the sequence.
    EosCertain,
    /// Forced: the remaining steps are reserved for the answer.
    AnswerReserve,
    /// Forced: the text that ends the thinking has been printed.
    Locked,
    /// Forced: the answer has been asked for, after too many exits.
    Terminated,
    /// A control follows the modes of another run.
    Scheduled,
    /// The entropy is not a finite number.
    NotFinite,
    /// A user's own rule said so.
    Custom,
}

impl Reason {
    /// The name under which the reason is recorded.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AboveAlpha => "above_alpha",
            Self::BelowAlpha => "below_alpha",
            Self::WarmupAboveAlpha => "warmup_above_alpha",
            Self::WarmupBelowAlpha => "warmup_below_alpha",
            Self::Converged => "converged",
            Self::Converging => "converging",
            Self::Uncertain => "uncertain",
            Self::Keep => "keep",
            Self::AboveReference => "above_reference",
            Self::BelowReference => "below_reference",
            Self::Patience => "patience",
            Self::NoReturn => "no_return",
            Self::Always => "always",
            Self::StartLatent => "start_latent",
            Self::Dwell => "dwell",
            Self::Cap => "cap",
            Self::LatentBudget => "latent_budget",
            Self::EosCertain => "eos_certain",
            Self::AnswerReserve => "answer_reserve",
            Self::Locked => "locked",
            Self::Terminated => "terminated",
            Self::Scheduled => "scheduled",
            Self::NotFinite => "not_finite",
            Self::Custom => "custom",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// An exit to explicit mode that the loop asks for, whatever the gate thinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Force {
    /// The end of the sequence is the most probable token with near certainty.
    EosCertain,
    /// The last steps are kept for the answer.
    AnswerReserve,
    /// The text that ends the thinking has been printed, or is the most probable token now.
    Locked,
    /// The answer has been asked for, after too many exits from latent mode.
    Terminated,
}

impl Force {
    /// The reason it gives a decision.
    #[must_use]
    pub const fn reason(self) -> Reason {
        match self {
            Self::EosCertain => Reason::EosCertain,
            Self::AnswerReserve => Reason::AnswerReserve,
            Self::Locked => Reason::Locked,
            Self::Terminated => Reason::Terminated,
        }
    }
}

/// The outcome of one observation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Decision {
    /// Mode of the next step.
    pub mode: Mode,
    /// Whether it differs from the previous decision's; never true for the first.
    pub switched: bool,
    /// Why.
    pub reason: Reason,
}

/// Why a controller could not decide: the original error of a user's own rule.
pub type ControllerFailure = Box<dyn std::error::Error + Send + Sync>;

/// Turns a sample's entropies into modes, one decision per step.
///
/// Implementations are pure state machines: a fresh one fed the same observations makes the same
/// decisions, so a recorded trace can be replayed.
pub trait Controller: Send {
    /// Decides the mode of the next step.
    ///
    /// `entropy` is the mean of the experts' entropies, in the specification's `alpha_unit`, and
    /// finite. `force` asks for explicit mode.
    ///
    /// # Errors
    /// Whatever a user's own rule failed with; the built-in gates never fail.
    fn observe(
        &mut self,
        entropy: f64,
        force: Option<Force>,
    ) -> Result<Decision, ControllerFailure>;

    /// Changes of mode so far, forced ones included.
    fn switches(&self) -> u32;

    /// Latent decisions so far.
    fn latent_steps(&self) -> u32;

    /// The mode of the last decision, none before the first.
    fn mode(&self) -> Option<Mode>;
}

/// A user's own gate. Budget, cap, dwell and forced exits are kept around it by [`RuleController`].
pub trait Rule: Send {
    /// The mode wanted for the next step; `mode` is that of the last, none before the first.
    ///
    /// # Errors
    /// Anything; the sample's run ends with it.
    fn wish(&mut self, entropy: f64, mode: Option<Mode>) -> Result<Mode, ControllerFailure>;
}

/// What binds every gate: budget, cap and dwell, and the counts they are kept by.
#[derive(Clone, Debug)]
struct Limits {
    spec: ControllerSpec,
    mode: Option<Mode>,
    /// Consecutive decisions for the current mode.
    dwell: u32,
    switches: u32,
    latent_steps: u32,
}

impl Limits {
    fn new(spec: &ControllerSpec) -> Result<Self, SpecError> {
        spec.validate()?;
        Ok(Self {
            spec: spec.clone(),
            mode: None,
            dwell: 0,
            switches: 0,
            latent_steps: 0,
        })
    }

    /// The decision that no gate is asked about.
    fn forced(&self, entropy: f64, force: Option<Force>) -> Option<(Mode, Reason)> {
        let reason = if !entropy.is_finite() {
            Reason::NotFinite
        } else if self.latent_steps >= self.spec.max_latent_steps {
            Reason::LatentBudget
        } else {
            force?.reason()
        };
        Some((Mode::Explicit, reason))
    }

    /// The gate's wish within cap and dwell.
    fn bound(&self, wish: Mode, reason: Reason) -> (Mode, Reason) {
        let minimum = match self.mode {
            // A mode that stays needs nothing; a first decision binds no dwell.
            Some(mode) if mode == wish => return (wish, reason),
            None => 0,
            Some(Mode::Latent) => self.spec.min_dwell_latent,
            Some(Mode::Explicit) => self.spec.min_dwell_explicit,
        };
        if wish == Mode::Latent && !self.can_enter_latent() {
            return (Mode::Explicit, Reason::Cap);
        }
        match self.mode {
            Some(mode) if self.dwell < minimum => (mode, Reason::Dwell),
            _ => (wish, reason),
        }
    }

    /// Whether the switches into latent mode and out of it again stay within the cap.
    fn can_enter_latent(&self) -> bool {
        let price = if self.mode.is_none() { 1 } else { 2 };
        self.spec.cap < 0 || i64::from(self.switches) + price <= self.spec.cap
    }

    fn commit(&mut self, mode: Mode, reason: Reason) -> Decision {
        let switched = self.mode.is_some_and(|before| before != mode);
        if switched {
            self.switches = self.switches.saturating_add(1);
        }
        self.dwell = if self.mode == Some(mode) {
            self.dwell.saturating_add(1)
        } else {
            1
        };
        if mode == Mode::Latent {
            self.latent_steps = self.latent_steps.saturating_add(1);
        }
        self.mode = Some(mode);
        Decision {
            mode,
            switched,
            reason,
        }
    }
}

/// The controller of a [`ControllerSpec`].
///
/// In order of precedence: an entropy that is not finite (a caller's error), the spent latent
/// budget, a forced exit, then the start rule or the gate, within cap and dwell. Since latent mode is
/// entered only if its exit can be paid for, `switches <= cap` always holds.
#[derive(Clone, Debug)]
pub struct GateController {
    limits: Limits,
    window: VecDeque<f64>,
    /// Entropy of the current block's first step.
    reference: f64,
    /// Entropies below `alpha` up to the last, one after another.
    below: u32,
}

/// A user's [`Rule`] in place of the gate, under the same budget, cap, dwell and forced exits.
pub struct RuleController {
    limits: Limits,
    rule: Box<dyn Rule>,
}

impl RuleController {
    /// A controller before its first step. Fails if the specification is invalid.
    pub fn new(spec: &ControllerSpec, rule: Box<dyn Rule>) -> Result<Self, SpecError> {
        Ok(Self {
            limits: Limits::new(spec)?,
            rule,
        })
    }
}

impl Controller for RuleController {
    fn observe(
        &mut self,
        entropy: f64,
        force: Option<Force>,
    ) -> Result<Decision, ControllerFailure> {
        // The rule sees every entropy, forced or not: one that keeps a window must not miss any.
        let wish = self.rule.wish(entropy, self.limits.mode)?;
        let (mode, reason) = self
            .limits
            .forced(entropy, force)
            .unwrap_or_else(|| self.limits.bound(wish, Reason::Custom));
        Ok(self.limits.commit(mode, reason))
    }

    fn switches(&self) -> u32 {
        self.limits.switches
    }

    fn latent_steps(&self) -> u32 {
        self.limits.latent_steps
    }

    fn mode(&self) -> Option<Mode> {
        self.limits.mode
    }
}

impl GateController {
    /// A controller before its first step. Fails if the specification is invalid.
    pub fn new(spec: &ControllerSpec) -> Result<Self, SpecError> {
        Ok(Self {
            limits: Limits::new(spec)?,
            window: VecDeque::new(),
            reference: f64::NAN,
            below: 0,
        })
    }

    /// The specification it runs.
    #[must_use]
    pub fn spec(&self) -> &ControllerSpec {
        &self.limits.spec
    }

    fn decide(&self, entropy: f64, force: Option<Force>) -> (Mode, Reason) {
        if let Some(forced) = self.limits.forced(entropy, force) {
            return forced;
        }
        let spec = &self.limits.spec;
        let (wish, reason) = match (self.limits.mode, spec.start) {
            (None, Start::Latent) if spec.gate != Gate::AlwaysExplicit => {
                (Mode::Latent, Reason::StartLatent)
            }
            _ => self.gate(entropy),
        };
        self.limits.bound(wish, reason)
    }

    /// Decides the mode of the next step; see [`Controller::observe`]. Never fails.
    pub fn observe(&mut self, entropy: f64, force: Option<Force>) -> Decision {
        debug_assert!(
            entropy.is_finite(),
            "the loop stops a row whose entropy is not finite"
        );
        if self.limits.spec.gate == Gate::Trend && entropy.is_finite() {
            if self.window.len() >= self.width() {
                self.window.pop_front();
            }
            self.window.push_back(entropy);
        }
        self.below = if entropy < self.limits.spec.alpha {
            self.below.saturating_add(1)
        } else {
            0
        };
        let (mode, reason) = self.decide(entropy, force);
        let decision = self.limits.commit(mode, reason);
        if decision.switched || self.reference.is_nan() {
            self.reference = entropy;
        }
        decision
    }

    /// Changes of mode so far, forced ones included.
    #[must_use]
    pub fn switches(&self) -> u32 {
        self.limits.switches
    }

    /// Latent decisions so far.
    #[must_use]
    pub fn latent_steps(&self) -> u32 {
        self.limits.latent_steps
    }

    /// The mode of the last decision, none before the first.
    #[must_use]
    pub fn mode(&self) -> Option<Mode> {
        self.limits.mode
    }

    fn gate(&self, entropy: f64) -> (Mode, Reason) {
        let above = entropy > self.limits.spec.alpha;
        match self.limits.spec.gate {
            Gate::AlwaysLatent => (Mode::Latent, Reason::Always),
            Gate::AlwaysExplicit => (Mode::Explicit, Reason::Always),
            Gate::Threshold if above => (Mode::Latent, Reason::AboveAlpha),
            Gate::Threshold => (Mode::Explicit, Reason::BelowAlpha),
            Gate::Reference => self.against_reference(entropy),
            Gate::LatentThenExplicit if self.limits.mode == Some(Mode::Explicit) => {
                (Mode::Explicit, Reason::NoReturn)
            }
            Gate::LatentThenExplicit if self.below >= self.limits.spec.patience => {
                (Mode::Explicit, Reason::BelowAlpha)
            }
            Gate::LatentThenExplicit if self.below > 0 => (Mode::Latent, Reason::Patience),
            Gate::LatentThenExplicit => (Mode::Latent, Reason::AboveAlpha),
            Gate::Trend if self.window.len() >= self.width() => self.trend(entropy),
            Gate::Trend if above => (Mode::Latent, Reason::WarmupAboveAlpha),
            Gate::Trend => (Mode::Explicit, Reason::WarmupBelowAlpha),
        }
    }

    fn against_reference(&self, entropy: f64) -> (Mode, Reason) {
        match self.limits.mode {
            None => (Mode::Latent, Reason::StartLatent),
            Some(Mode::Latent) if entropy < self.reference => {
                (Mode::Explicit, Reason::BelowReference)
            }
            Some(Mode::Explicit) if entropy > self.reference => {
                (Mode::Latent, Reason::AboveReference)
            }
            Some(mode) => (mode, Reason::Keep),
        }
    }

    fn trend(&self, entropy: f64) -> (Mode, Reason) {
        let Trend {
            mean,
            slope,
            variance,
        } = Trend::of(&self.window);
        let convergence = self.limits.spec.convergence_threshold();
        if entropy < convergence {
            (Mode::Explicit, Reason::Converged)
        } else if slope < -self.limits.spec.slope_eps() && variance < self.limits.spec.var_eps() {
            (Mode::Explicit, Reason::Converging)
        } else if mean >= self.limits.spec.alpha || (slope >= 0.0 && mean > convergence) {
            (Mode::Latent, Reason::Uncertain)
        } else {
            (self.limits.mode.unwrap_or(Mode::Latent), Reason::Keep)
        }
    }

    fn width(&self) -> usize {
        self.limits.spec.w.unwrap_or(0) as usize
    }
}

/// Mean, least-squares slope per step and population variance of a window, oldest first.
struct Trend {
    mean: f64,
    slope: f64,
    variance: f64,
}

impl Trend {
    fn of(window: &VecDeque<f64>) -> Self {
        let n = window.len() as f64;
        let mean = window.iter().sum::<f64>() / n;
        let centre = (n - 1.0) / 2.0;
        let (mut covariance, mut spread, mut square) = (0.0, 0.0, 0.0);
        for (index, &entropy) in window.iter().enumerate() {
            let x = index as f64 - centre;
            let y = entropy - mean;
            covariance += x * y;
            spread += x * x;
            square += y * y;
        }
        Self {
            mean,
            slope: covariance / spread,
            variance: square / n,
        }
    }
}

impl Controller for GateController {
    fn observe(
        &mut self,
        entropy: f64,
        force: Option<Force>,
    ) -> Result<Decision, ControllerFailure> {
        Ok(Self::observe(self, entropy, force))
    }

    fn switches(&self) -> u32 {
        self.limits.switches
    }

    fn latent_steps(&self) -> u32 {
        self.limits.latent_steps
    }

    fn mode(&self) -> Option<Mode> {
        self.limits.mode
    }
}

/// The modes of a run as lengths of its stretches: explicit, latent, explicit and so on, the first
/// possibly 0. After the last the mode is explicit.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Schedule {
    runs: Vec<u32>,
}

impl Schedule {
    /// Adds the mode of one more step.
    pub fn push(&mut self, mode: Mode) {
        // Stretches with an odd place are latent.
        let open = match self.runs.len() {
            0 => None,
            n if n % 2 == 0 => Some(Mode::Latent),
            _ => Some(Mode::Explicit),
        };
        if open != Some(mode) {
            if open.is_none() && mode == Mode::Latent {
                self.runs.push(0);
            }
            self.runs.push(0);
        }
        if let Some(last) = self.runs.last_mut() {
            *last += 1;
        }
    }

    /// The mode of a step, explicit beyond the end.
    #[must_use]
    pub fn mode(&self, step: u32) -> Mode {
        let mut end = 0_u64;
        for (place, &run) in self.runs.iter().enumerate() {
            end += u64::from(run);
            if u64::from(step) < end {
                return if place % 2 == 1 {
                    Mode::Latent
                } else {
                    Mode::Explicit
                };
            }
        }
        Mode::Explicit
    }

    /// Lengths of the stretches, explicit first.
    #[must_use]
    pub fn runs(&self) -> &[u32] {
        &self.runs
    }
}

impl From<Vec<u32>> for Schedule {
    fn from(runs: Vec<u32>) -> Self {
        Self { runs }
    }
}

impl FromIterator<Mode> for Schedule {
    fn from_iter<I: IntoIterator<Item = Mode>>(modes: I) -> Self {
        let mut schedule = Self::default();
        modes.into_iter().for_each(|mode| schedule.push(mode));
        schedule
    }
}

/// Follows the modes of another run whatever the entropies, within budget, cap and forced exits: the
/// control that keeps exits and takes away what was fed in between.
pub struct ScheduleController {
    limits: Limits,
    schedule: Schedule,
    step: u32,
}

impl ScheduleController {
    /// A controller before its first step. Fails if the specification is invalid.
    pub fn new(spec: &ControllerSpec, schedule: Schedule) -> Result<Self, SpecError> {
        let free = ControllerSpec {
            min_dwell_latent: 0,
            min_dwell_explicit: 0,
            ..spec.clone()
        };
        Ok(Self {
            limits: Limits::new(&free)?,
            schedule,
            step: 0,
        })
    }

    /// The same, starting at a later step of the schedule.
    #[must_use]
    pub fn at(mut self, step: u32) -> Self {
        self.step = step;
        self
    }
}

impl Controller for ScheduleController {
    fn observe(
        &mut self,
        entropy: f64,
        force: Option<Force>,
    ) -> Result<Decision, ControllerFailure> {
        let wish = self.schedule.mode(self.step);
        self.step = self.step.saturating_add(1);
        let (mode, reason) = self
            .limits
            .forced(entropy, force)
            .unwrap_or_else(|| self.limits.bound(wish, Reason::Scheduled));
        Ok(self.limits.commit(mode, reason))
    }

    fn switches(&self) -> u32 {
        self.limits.switches
    }

    fn latent_steps(&self) -> u32 {
        self.limits.latent_steps
    }

    fn mode(&self) -> Option<Mode> {
        self.limits.mode
    }
}

/// What an exit from latent mode injects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Inject {
    /// The text that ends the thinking.
    Converge,
    /// The text that asks for the answer.
    Terminate,
}

/// Counts a sample's exits from latent mode and says what each injects: pure and replayable.
#[derive(Clone, Debug)]
pub struct Triggers {
    spec: TriggerSpec,
    exits: u32,
    /// Tokens that may still be printed, once the answer has been asked for.
    left: Option<u32>,
}

impl Triggers {
    /// The state before the first step. Fails if the specification is invalid.
    pub fn new(spec: &TriggerSpec) -> Result<Self, SpecError> {
        spec.validate()?;
        Ok(Self {
            spec: spec.clone(),
            exits: 0,
            left: None,
        })
    }

    /// One more switch from latent to explicit mode; what it injects in place of a token.
    pub fn exit(&mut self) -> Option<Inject> {
        self.exits = self.exits.saturating_add(1);
        if self.left.is_some() || self.exits < self.spec.converge_after {
            None
        } else if self.exits <= self.spec.terminate_after {
            Some(Inject::Converge)
        } else {
            self.left = Some(self.spec.terminate_steps);
            Some(Inject::Terminate)
        }
    }

    /// One more printed token; whether it was the last.
    pub fn printed(&mut self) -> bool {
        if let Some(left) = &mut self.left {
            *left = left.saturating_sub(1);
        }
        self.left == Some(0)
    }

    /// The exit forced at every step once the answer has been asked for.
    #[must_use]
    pub fn force(&self) -> Option<Force> {
        self.left.map(|_| Force::Terminated)
    }

    /// Exits so far.
    #[must_use]
    pub fn exits(&self) -> u32 {
        self.exits
    }
}
