//! Selection of the largest entries of a row under one exact order.

use std::cmp::Ordering;

/// The order of every list in the project: value descending, then id ascending. NaN comes last.
#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the shape of a sort's comparison"
)]
pub(crate) fn by_value_then_id(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    match b.1.partial_cmp(&a.1) {
        Some(order) => order,
        None => a.1.is_nan().cmp(&b.1.is_nan()),
    }
    .then(a.0.cmp(&b.0))
}

/// The `k` largest values with their positions, value descending, id ascending among equals.
///
/// `out` is cleared and refilled with `min(k, values.len())` pairs. `-0` and `0` are equal,
/// infinities are ordinary values, NaN ranks below `-inf`. The result depends on the values alone.
/// O(V + k log k) on average. Positions beyond `u32::MAX` are not representable and are ignored.
pub fn top_k(values: &[f32], k: usize, out: &mut Vec<(u32, f32)>) {
    out.clear();
    let k = k.min(values.len());
    if k == 0 {
        return;
    }
    // Candidates gather up to twice k, then only the best k stay and set the bar for the rest.
    let room = k.saturating_mul(2).min(values.len());
    out.reserve(room);
    let mut bar = None;
    for (id, &value) in (0..=u32::MAX).zip(values) {
        // Ids arrive in ascending order, so a value equal to the bar comes after it.
        if bar.is_some_and(|bar: f32| !(value > bar || (bar.is_nan() && !value.is_nan()))) {
            continue;
        }
        out.push((id, value));
        if out.len() == room && k < room {
            out.select_nth_unstable_by(k - 1, by_value_then_id);
            out.truncate(k);
            bar = Some(out[k - 1].1);
        }
    }
    if out.len() > k {
        out.select_nth_unstable_by(k - 1, by_value_then_id);
        out.truncate(k);
    }
    out.sort_unstable_by(by_value_then_id);
}
