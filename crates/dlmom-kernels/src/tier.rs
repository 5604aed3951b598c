//! Instruction sets, chosen at run time.

use std::fmt;

/// What the loops are compiled for. Every tier gives the same bits: the same operations on the same
/// lanes in the same order, and never a fused multiply-add.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// What every processor of the target has: SSE2 on x86-64, NEON on aarch64.
    Generic,
    /// AVX2 (x86-64).
    Avx2,
    /// AVX-512 F, BW, DQ and VL (x86-64).
    Avx512,
}

impl Tier {
    /// All tiers, the slowest first.
    pub const ALL: [Self; 3] = [Self::Generic, Self::Avx2, Self::Avx512];

    /// Whether this processor can run it.
    #[must_use]
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let found = match self {
            Self::Generic => true,
            Self::Avx2 => is_x86_feature_detected!("avx2"),
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
        };
        #[cfg(not(target_arch = "x86_64"))]
        let found = self == Self::Generic;
        found
    }

    /// The fastest that this processor can run.
    #[must_use]
    pub fn best() -> Self {
        let available = |tier: &Self| tier.is_available();
        Self::ALL
            .into_iter()
            .rev()
            .find(available)
            .unwrap_or(Self::Generic)
    }

    /// The tier of a [`Tier::name`].
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|tier| tier.name() == name)
    }

    /// `generic`, `avx2` or `avx512`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Generic => "generic",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tier that this processor can run: the loops are only entered with one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Available(Tier);

impl Available {
    pub(crate) fn new(tier: Tier) -> Option<Self> {
        tier.is_available().then_some(Self(tier))
    }

    pub(crate) fn best() -> Self {
        Self(Tier::best())
    }

    pub(crate) fn tier(self) -> Tier {
        self.0
    }
}

/// A function that runs `$body` compiled for a tier. Whatever `$body` calls must be inlined into it.
macro_rules! tiered {
    ($(#[$meta:meta])* fn $name:ident($($arg:ident: $kind:ty),* $(,)?) = $body:ident) => {
        $(#[$meta])*
        pub(crate) fn $name(available: $crate::tier::Available, $($arg: $kind),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $kind),*) {
                    $body($($arg),*);
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $kind),*) {
                    $body($($arg),*);
                }
                match available.tier() {
                    $crate::tier::Tier::Avx512 => {
                        // SAFETY: `Available` holds only tiers whose features were detected.
                        #[expect(unsafe_code, reason = "code for a detected instruction set")]
                        unsafe { avx512($($arg),*) };
                        return;
                    }
                    $crate::tier::Tier::Avx2 => {
                        // SAFETY: as above.
                        #[expect(unsafe_code, reason = "code for a detected instruction set")]
                        unsafe { avx2($($arg),*) };
                        return;
                    }
                    $crate::tier::Tier::Generic => {}
                }
            }
            let _ = available;
            $body($($arg),*);
        }
    };
}
pub(crate) use tiered;
