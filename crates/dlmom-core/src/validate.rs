//! Range checks of the knobs: what the types cannot say.

use thiserror::Error;

use crate::spec::{ConsensusSpec, ControllerSpec, Gate, NoiseSpec, SamplingSpec};

/// A knob outside its range; one variant per knob and cause.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum SpecError {
    /// `alpha` is negative, infinite or NaN.
    #[error("alpha is {value}; it must be a finite number of at least 0")]
    Alpha {
        /// The rejected value.
        value: f64,
    },
    /// `cap` is below -1.
    #[error("cap is {value}; it must be -1 (unlimited), 0 (explicit only) or a positive count")]
    Cap {
        /// The rejected value.
        value: i64,
    },
    /// The trend gate has no window.
    #[error("w is missing; the trend gate needs a window of at least 2 steps")]
    WindowMissing,
    /// The trend gate's window cannot hold a slope.
    #[error("w is {value}; the trend gate needs a window of at least 2 steps")]
    WindowTooSmall {
        /// The rejected value.
        value: u32,
    },
    /// `convergence_threshold` is negative, infinite or NaN.
    #[error("convergence_threshold is {value}; it must be a finite number of at least 0")]
    ConvergenceThreshold {
        /// The rejected value.
        value: f64,
    },
    /// `slope_eps` is negative, infinite or NaN.
    #[error("slope_eps is {value}; it must be a finite number of at least 0")]
    SlopeEps {
        /// The rejected value.
        value: f64,
    },
    /// `var_eps` is negative, infinite or NaN.
    #[error("var_eps is {value}; it must be a finite number of at least 0")]
    VarEps {
        /// The rejected value.
        value: f64,
    },
    /// The trim threshold of `ties` is negative, infinite or NaN.
    #[error("theta is {value}; it must be a finite number of at least 0")]
    Theta {
        /// The rejected value.
        value: f32,
    },
    /// The divisor offset of `ties` is negative, infinite or NaN.
    #[error("eps is {value}; it must be a finite number of at least 0")]
    Eps {
        /// The rejected value.
        value: f32,
    },
    /// The Gumbel temperature is not positive and finite.
    #[error("tau is {value}; it must be a finite number above 0")]
    Tau {
        /// The rejected value.
        value: f64,
    },
    /// The Dirichlet concentration is not positive and finite.
    #[error("lambda is {value}; it must be a finite number above 0")]
    Lambda {
        /// The rejected value.
        value: f64,
    },
    /// The sampling temperature is negative, infinite or NaN.
    #[error("temperature is {value}; it must be 0 (greedy) or a finite number above 0")]
    Temperature {
        /// The rejected value.
        value: f64,
    },
    /// `top_p` is outside `(0, 1]`.
    #[error("top_p is {value}; it must be above 0 and at most 1")]
    TopP {
        /// The rejected value.
        value: f64,
    },
    /// `min_p` is outside `[0, 1)`.
    #[error("min_p is {value}; it must be at least 0 and below 1")]
    MinP {
        /// The rejected value.
        value: f64,
    },
}

fn non_negative(value: f64) -> bool {
    value.is_finite() && value >= 0.0
}

fn positive(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

impl ControllerSpec {
    /// Checks every knob. The window is required of the trend gate only and ignored elsewhere.
    pub fn validate(&self) -> Result<(), SpecError> {
        if !non_negative(self.alpha) {
            return Err(SpecError::Alpha { value: self.alpha });
        }
        if self.cap < -1 {
            return Err(SpecError::Cap { value: self.cap });
        }
        if self.gate == Gate::Trend {
            match self.w {
                None => return Err(SpecError::WindowMissing),
                Some(value) if value < 2 => return Err(SpecError::WindowTooSmall { value }),
                Some(_) => {}
            }
        }
        match (self.convergence_threshold, self.slope_eps, self.var_eps) {
            (Some(value), _, _) if !non_negative(value) => {
                Err(SpecError::ConvergenceThreshold { value })
            }
            (_, Some(value), _) if !non_negative(value) => Err(SpecError::SlopeEps { value }),
            (_, _, Some(value)) if !non_negative(value) => Err(SpecError::VarEps { value }),
            _ => Ok(()),
        }
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

impl ConsensusSpec {
    /// Checks the operator's knobs.
    pub fn validate(&self) -> Result<(), SpecError> {
        match *self {
            Self::Ties { theta, .. } if !non_negative(f64::from(theta)) => {
                Err(SpecError::Theta { value: theta })
            }
            Self::Ties { eps, .. } if !non_negative(f64::from(eps)) => {
                Err(SpecError::Eps { value: eps })
            }
            Self::Ties { .. } | Self::Mean => Ok(()),
        }
    }
}

impl NoiseSpec {
    /// Checks the noise's parameter.
    pub fn validate(&self) -> Result<(), SpecError> {
        match *self {
            Self::Gumbel { tau } if !positive(tau) => Err(SpecError::Tau { value: tau }),
            Self::Dirichlet { lambda } if !positive(lambda) => {
                Err(SpecError::Lambda { value: lambda })
            }
            Self::None | Self::Gumbel { .. } | Self::Dirichlet { .. } => Ok(()),
        }
    }
}

impl SamplingSpec {
    /// Checks every knob; `top_k` has no invalid value.
    pub fn validate(&self) -> Result<(), SpecError> {
        if !non_negative(self.temperature) {
            return Err(SpecError::Temperature {
                value: self.temperature,
            });
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(SpecError::TopP { value: self.top_p });
        }
        if !(self.min_p >= 0.0 && self.min_p < 1.0) {
            return Err(SpecError::MinP { value: self.min_p });
        }
        Ok(())
    }
}
