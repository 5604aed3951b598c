//! Where a recorded sample changed its mode.

use dlmom_core::Mode;
use dlmom_runtime::HandoffRecord;

/// Steps of another mode than the one before. The first step after a handoff is none: every visit begins with a fresh
/// controller, whose first decision is uncounted.
pub(crate) fn switches<'a>(
    modes: &'a [Mode],
    handoffs: &'a [HandoffRecord],
) -> impl Iterator<Item = usize> + 'a {
    (1..modes.len()).filter(|&step| {
        let handed = |record: &HandoffRecord| record.step as usize + 1 == step;
        modes[step] != modes[step - 1] && !handoffs.iter().any(handed)
    })
}

#[cfg(test)]
mod tests {
    use dlmom_runtime::{Handoff, Trigger};

    use super::*;

    #[test]
    fn a_change_of_mode_across_a_handoff_is_no_switch() {
        use Mode::{Explicit as E, Latent as L};
        let modes = [L, L, E, L, E, E, L];
        let handoff = |step| HandoffRecord {
            step,
            from: 0,
            to: 0,
            trigger: Trigger::Convergence,
            payload: Handoff::Transcript,
            positions: 0,
            bytes: 0,
        };
        let found = |handoffs: &[HandoffRecord]| switches(&modes, handoffs).collect::<Vec<_>>();
        assert_eq!(found(&[]), [2, 3, 4, 6]);
        assert_eq!(found(&[handoff(2), handoff(5)]), [2, 4]);
        assert_eq!(switches(&[], &[]).count(), 0);
    }
}
