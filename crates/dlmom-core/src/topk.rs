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
/// O(V log k) at worst and near O(V) when `k` is much smaller than V. Positions beyond `u32::MAX`
/// are not representable and are ignored.
pub fn top_k(values: &[f32], k: usize, out: &mut Vec<(u32, f32)>) {
    out.clear();
    let k = k.min(values.len());
    if k == 0 {
        return;
    }
    out.reserve(k);
    let mut entries = (0_u32..=u32::MAX).zip(values.iter().copied());
    out.extend(entries.by_ref().take(k));
    if k < values.len() {
        for root in (0..k / 2).rev() {
            sift_down(out, root);
        }
        let mut worst = out[0].1;
        for (id, value) in entries {
            // Ids arrive in ascending order, so an equal value never displaces an earlier one.
            if value > worst || (worst.is_nan() && !value.is_nan()) {
                out[0] = (id, value);
                sift_down(out, 0);
                worst = out[0].1;
            }
        }
    }
    out.sort_unstable_by(by_value_then_id);
}

/// Restores the heap whose root is the entry that comes last in the order.
fn sift_down(heap: &mut [(u32, f32)], mut at: usize) {
    loop {
        let left = 2 * at + 1;
        if left >= heap.len() {
            return;
        }
        let right = left + 1;
        let child = if right < heap.len()
            && by_value_then_id(&heap[right], &heap[left]) == Ordering::Greater
        {
            right
        } else {
            left
        };
        if by_value_then_id(&heap[child], &heap[at]) != Ordering::Greater {
            return;
        }
        heap.swap(at, child);
        at = child;
    }
}
