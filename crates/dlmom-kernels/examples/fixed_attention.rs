//! A fixed amount of work, for counting instructions: one attention over 16 ragged rows, 4 heads on 2 of keys, in float32 and
//! in bfloat16, on AVX2, which valgrind knows. The first argument may name another instruction set.

use dlmom_kernels::{Attention, Floats, Grid, Kernel, Tier};
use half::bf16;

const ROWS: usize = 16;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const POSITIONS: usize = 256;
const SIZE: usize = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let named = std::env::args().nth(1).and_then(|name| Tier::named(&name));
    let tier = named.unwrap_or(Tier::Avx2);
    let kernel = Kernel::with_tier(tier, 1)?;
    let number = |i: usize| ((i * 2_654_435_769) % 65_536) as f32 / 32_768.0 - 1.0;
    let wide: Vec<f32> = (0..ROWS * KV_HEADS * POSITIONS * SIZE)
        .map(number)
        .collect();
    let halves: Vec<bf16> = wide.iter().map(|&x| bf16::from_f32(x)).collect();
    let visible: Vec<(usize, usize)> = (0..ROWS).map(|row| (0, 16 * (row + 1))).collect();
    let mut out = vec![0.0; ROWS * HEADS * SIZE];
    for data in [Floats::F32(&wide), Floats::Bf16(&halves)] {
        let store = Grid {
            data,
            shape: [ROWS, KV_HEADS, POSITIONS, SIZE],
            strides: [KV_HEADS * POSITIONS * SIZE, POSITIONS * SIZE, SIZE],
        };
        let queries = Grid {
            data,
            shape: [ROWS, HEADS, 1, SIZE],
            strides: [HEADS * SIZE, SIZE, SIZE],
        };
        let call = Attention {
            queries,
            keys: store,
            values: store,
            visible: &visible,
            scale: 0.125,
        };
        kernel.attend(&call, &mut out)?;
        std::hint::black_box(&out);
    }
    Ok(())
}
