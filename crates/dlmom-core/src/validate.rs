//! Range checks of the knobs: what the types cannot say.

use std::fmt::Display;

use thiserror::Error;

use crate::spec::{
    AlphaUnit, Calibrate, Center, ConsensusSpec, ControllerSpec, FilterSpec, Gate, Method,
    NoiseSpec, SamplingSpec, TriggerSpec, Trim, Weights,
};

/// A knob that cannot be used as it is.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SpecError {
    /// A value outside its range.
    #[error("{knob} is {value}; it must be {must}")]
    Range {
        /// The knob.
        knob: &'static str,
        /// The rejected value.
        value: String,
        /// The range, in words.
        must: &'static str,
    },
    /// The trend gate has no window, or one that cannot hold a slope.
    #[error("w is {value}; the trend gate needs a window of at least 2 steps")]
    Window {
        /// The rejected value, or `missing`.
        value: String,
    },
    /// A knob that reaches nothing beside another.
    #[error("{knob} reaches nothing {beside}")]
    Inert {
        /// The knob.
        knob: &'static str,
        /// The other knob and its value.
        beside: String,
    },
    /// A list of another length than there are experts.
    #[error("{knob} has {found} numbers for {experts} experts")]
    Experts {
        /// The knob.
        knob: &'static str,
        /// Numbers given.
        found: usize,
        /// Experts there are.
        experts: usize,
    },
}

const NOT_NEGATIVE: &str = "a finite number of at least 0";
const POSITIVE: &str = "a finite number above 0";
const UNIT: &str = "at least 0 and at most 1";

fn non_negative(value: f64) -> bool {
    value.is_finite() && value >= 0.0
}

fn positive(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

fn check(
    knob: &'static str,
    value: impl Display,
    holds: bool,
    must: &'static str,
) -> Result<(), SpecError> {
    if holds {
        return Ok(());
    }
    Err(SpecError::Range {
        knob,
        value: value.to_string(),
        must,
    })
}

impl ControllerSpec {
    /// Checks every knob. The window is required of the trend gate only and ignored elsewhere.
    pub fn validate(&self) -> Result<(), SpecError> {
        check("alpha", self.alpha, non_negative(self.alpha), NOT_NEGATIVE)?;
        if self.alpha_unit == AlphaUnit::Quantile {
            check("alpha", self.alpha, self.alpha <= 1.0, UNIT)?;
        }
        check(
            "cap",
            self.cap,
            self.cap >= -1,
            "-1 (unlimited), 0 (explicit only) or a positive count",
        )?;
        if self.gate == Gate::Trend && self.w.is_none_or(|w| w < 2) {
            return Err(SpecError::Window {
                value: self.w.map_or_else(|| "missing".into(), |w| w.to_string()),
            });
        }
        for (knob, value) in [
            ("convergence_threshold", self.convergence_threshold),
            ("slope_eps", self.slope_eps),
            ("var_eps", self.var_eps),
        ] {
            if let Some(value) = value {
                check(knob, value, non_negative(value), NOT_NEGATIVE)?;
            }
        }
        check("patience", self.patience, self.patience >= 1, "at least 1")
    }

    /// The convergence threshold in `alpha_unit`: as given, else `0.25 alpha`.
    #[must_use]
    pub fn convergence_threshold(&self) -> f64 {
        self.convergence_threshold.unwrap_or(0.25 * self.alpha)
    }

    /// The slope threshold in `alpha_unit` per step: as given, else `0.02 alpha`.
    #[must_use]
    pub fn slope_eps(&self) -> f64 {
        self.slope_eps.unwrap_or(0.02 * self.alpha)
    }

    /// The variance threshold in `alpha_unit` squared: as given, else `(0.1 alpha)^2`.
    #[must_use]
    pub fn var_eps(&self) -> f64 {
        self.var_eps.unwrap_or((0.1 * self.alpha).powi(2))
    }
}

impl TriggerSpec {
    /// Checks the counts and that there is something to inject.
    pub fn validate(&self) -> Result<(), SpecError> {
        check(
            "triggers.converge_after",
            self.converge_after,
            self.converge_after >= 1,
            "at least 1",
        )?;
        check(
            "triggers.terminate_after",
            self.terminate_after,
            self.terminate_after >= self.converge_after,
            "at least triggers.converge_after",
        )?;
        for (knob, text) in [
            ("triggers.converge_text", &self.converge_text),
            ("triggers.terminate_text", &self.terminate_text),
        ] {
            check(knob, "empty", !text.is_empty(), "a text to inject")?;
        }
        check(
            "triggers.terminate_steps",
            self.terminate_steps,
            self.terminate_steps >= 1,
            "at least 1",
        )
    }
}

impl ConsensusSpec {
    /// Checks the operator's knobs; `experts` is their number, where known. A knob of `ties` beside
    /// another method is an error, because it would reach nothing.
    pub fn validate(&self, experts: Option<usize>) -> Result<(), SpecError> {
        let theta = f64::from(self.theta);
        check("theta", self.theta, non_negative(theta), NOT_NEGATIVE)?;
        check(
            "eps",
            self.eps,
            non_negative(f64::from(self.eps)),
            NOT_NEGATIVE,
        )?;
        if self.trim == Trim::Density {
            check(
                "theta",
                self.theta,
                theta > 0.0 && theta <= 1.0,
                "above 0 and at most 1 with trim: density",
            )?;
        }
        if let Some(rank) = self.spectral {
            check("spectral", rank, rank >= 1, "at least 1")?;
        }
        self.check_unused()?;
        if let Weights::Fixed(weights) = &self.weights {
            for &weight in weights {
                check("weights", weight, non_negative(weight), NOT_NEGATIVE)?;
            }
            // An empty sum is -0.
            let sum = 0.0 + weights.iter().sum::<f64>();
            check("weights", sum, positive(sum), "a list whose sum is above 0")?;
        }
        for &temperature in &self.temperatures {
            check("temperatures", temperature, positive(temperature), POSITIVE)?;
        }
        if let Some(gate) = &self.gate {
            if let Some(max_p) = gate.max_p {
                check(
                    "gate.max_p",
                    max_p,
                    max_p > 0.0 && max_p <= 1.0,
                    "above 0 and at most 1",
                )?;
            }
            if let Some(js) = gate.js {
                check("gate.js", js, non_negative(js), NOT_NEGATIVE)?;
            }
            check(
                "gate",
                "without a condition",
                gate.max_p.is_some() || gate.js.is_some(),
                "given max_p or js",
            )?;
        }
        let Some(experts) = experts else {
            return Ok(());
        };
        for (knob, found) in [
            (
                "weights",
                match &self.weights {
                    Weights::Fixed(weights) => weights.len(),
                    Weights::Rule(_) => experts,
                },
            ),
            (
                "temperatures",
                if self.temperatures.is_empty() {
                    experts
                } else {
                    self.temperatures.len()
                },
            ),
        ] {
            if found != experts {
                return Err(SpecError::Experts {
                    knob,
                    found,
                    experts,
                });
            }
        }
        for (knob, place) in [
            ("reference", self.reference),
            ("gate.pivot", self.gate.map_or(0, |g| g.pivot)),
        ] {
            check(
                knob,
                place,
                (place as usize) < experts,
                "the place of an expert, from 0",
            )?;
        }
        Ok(())
    }

    /// Knobs of `ties` beside another method, and values beside the choice that reads them.
    fn check_unused(&self) -> Result<(), SpecError> {
        let inert = |knob, beside: &str| {
            Err(SpecError::Inert {
                knob,
                beside: beside.to_owned(),
            })
        };
        let plain = Self::paper();
        if self.method != Method::Ties {
            let beside = "beside a method other than ties";
            for (knob, given) in [
                ("theta", self.theta.to_bits() != plain.theta.to_bits()),
                ("eps", self.eps.to_bits() != plain.eps.to_bits()),
                ("center", self.center != plain.center),
                ("trim", self.trim != plain.trim),
                ("elect", self.elect != plain.elect),
                ("tie", self.tie != plain.tie),
                ("spectral", self.spectral.is_some()),
            ] {
                if given {
                    return inert(knob, beside);
                }
            }
        }
        if self.reference != 0 && self.center != Center::Reference {
            return inert("reference", "without center: reference");
        }
        if !self.temperatures.is_empty() && self.calibrate != Calibrate::Temperature {
            return inert("temperatures", "without calibrate: temperature");
        }
        Ok(())
    }
}

impl NoiseSpec {
    /// Checks the noise's parameter.
    pub fn validate(&self) -> Result<(), SpecError> {
        match *self {
            Self::None => Ok(()),
            Self::Gumbel { tau } => check("tau", tau, positive(tau), POSITIVE),
            Self::Dirichlet { lambda } => check("lambda", lambda, positive(lambda), POSITIVE),
        }
    }
}

impl FilterSpec {
    /// Checks every knob; `keep` has no invalid value.
    pub fn validate(&self) -> Result<(), SpecError> {
        check(
            "filter.temperature",
            self.temperature,
            positive(self.temperature),
            POSITIVE,
        )?;
        top_p("filter.top_p", self.top_p)?;
        min_p("filter.min_p", self.min_p)
    }
}

fn top_p(knob: &'static str, value: f64) -> Result<(), SpecError> {
    check(
        knob,
        value,
        value > 0.0 && value <= 1.0,
        "above 0 and at most 1",
    )
}

fn min_p(knob: &'static str, value: f64) -> Result<(), SpecError> {
    check(
        knob,
        value,
        (0.0..1.0).contains(&value),
        "at least 0 and below 1",
    )
}

impl SamplingSpec {
    /// Checks every knob; `top_k` has no invalid value.
    pub fn validate(&self) -> Result<(), SpecError> {
        check(
            "temperature",
            self.temperature,
            non_negative(self.temperature),
            "0 (greedy) or a finite number above 0",
        )?;
        top_p("top_p", self.top_p)?;
        min_p("min_p", self.min_p)?;
        check(
            "repetition_penalty",
            self.repetition_penalty,
            self.repetition_penalty.is_finite() && self.repetition_penalty >= 1.0,
            "a finite number of at least 1",
        )
    }
}
