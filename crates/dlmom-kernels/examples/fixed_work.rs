//! A fixed amount of work, for counting instructions: one call of every fused path at V = 32,000, K = 3,
//! k = 50, on AVX2, which valgrind knows. The first argument may name another instruction set.

use dlmom_core::{ConsensusSpec, Method, Request, RowReadout};
use dlmom_kernels::{Kernel, KernelError, Logits, Scratch, Tier};
use half::bf16;

const VOCAB: u32 = 32_000;

fn main() -> Result<(), KernelError> {
    let named = std::env::args().nth(1).and_then(|name| Tier::named(&name));
    let tier = named.unwrap_or(Tier::Avx2);
    let kernel = Kernel::with_tier(tier, 1)?;

    // Weyl sequences: even, without a generator's cost in the count.
    let logit = |id: u32, expert: u32| {
        let shared = id.wrapping_mul(2_654_435_769) >> 8;
        let own = (id ^ expert << 16).wrapping_mul(2_246_822_519) >> 8;
        let unit = 1.0 / (1 << 24) as f32;
        let peak = if id % 997 == 13 { 9.0 } else { 0.0 };
        8.0 * shared as f32 * unit + 2.0 * own as f32 * unit + peak
    };
    let wide: Vec<Vec<f32>> = (0..3)
        .map(|expert| (0..VOCAB).map(|id| logit(id, expert)).collect())
        .collect();
    let halves: Vec<Vec<bf16>> = wide
        .iter()
        .map(|row| row.iter().map(|&z| bf16::from_f32(z)).collect())
        .collect();
    let wide: Vec<Logits<'_>> = wide.iter().map(|row| Logits::F32(row)).collect();
    let halves: Vec<Logits<'_>> = halves.iter().map(|row| Logits::Bf16(row)).collect();

    let request = Request {
        top: 50,
        ..Request::default()
    };
    let (mut scratch, mut out) = (Scratch::default(), RowReadout::default());
    let mut read = |rows: &[Logits<'_>], method| {
        let spec = ConsensusSpec::of(method);
        kernel.read_row(rows, &spec, &request, None, &mut scratch, &mut out);
        std::hint::black_box(&out);
    };
    read(&wide[..1], Method::Ties);
    for rows in [&wide, &halves] {
        for method in [Method::Ties, Method::Mean, Method::Arith] {
            read(rows, method);
        }
    }
    Ok(())
}
