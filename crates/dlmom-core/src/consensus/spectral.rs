//! The part of the experts' preferences that most of them share.

/// Sweeps of the eigenvalue iteration; for the few experts there are it converges in under ten.
const SWEEPS: usize = 60;

/// Projects K rows of one length onto the span of the `rank` leading left singular vectors, in place.
///
/// With X the K x n matrix and U the eigenvectors of its K x K Gram matrix `X X^T` by falling
/// eigenvalue, X becomes `U_r U_r^T X`: the closest matrix of that rank. A rank of K or more changes
/// nothing.
pub(super) fn project(rows: &mut [Vec<f64>], rank: usize) {
    let k = rows.len();
    if rank >= k {
        return;
    }
    let mut gram = vec![vec![0.0; k]; k];
    for a in 0..k {
        for b in 0..=a {
            let dot: f64 = rows[a].iter().zip(&rows[b]).map(|(x, y)| x * y).sum();
            gram[a][b] = dot;
            gram[b][a] = dot;
        }
    }
    let vectors = eigenvectors(gram);
    let mut projector = vec![vec![0.0; k]; k];
    for vector in vectors.iter().take(rank) {
        for a in 0..k {
            for b in 0..k {
                projector[a][b] += vector[a] * vector[b];
            }
        }
    }
    let width = rows.first().map_or(0, Vec::len);
    let mut column = vec![0.0; k];
    for j in 0..width {
        for (value, row) in column.iter_mut().zip(&*rows) {
            *value = row[j];
        }
        for (row, weights) in rows.iter_mut().zip(&projector) {
            row[j] = weights.iter().zip(&column).map(|(w, x)| w * x).sum();
        }
    }
}

/// Unit eigenvectors of a symmetric matrix by falling eigenvalue (cyclic Jacobi rotations).
fn eigenvectors(mut m: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let k = m.len();
    let mut v: Vec<Vec<f64>> = (0..k)
        .map(|i| (0..k).map(|j| f64::from(u8::from(i == j))).collect())
        .collect();
    for _ in 0..SWEEPS {
        let off: f64 = (0..k)
            .flat_map(|i| (0..i).map(move |j| (i, j)))
            .map(|(i, j)| m[i][j] * m[i][j])
            .sum();
        let diagonal: f64 = (0..k).map(|i| m[i][i] * m[i][i]).sum();
        if off <= 1e-30 * diagonal {
            break;
        }
        for p in 0..k {
            for q in p + 1..k {
                rotate(&mut m, &mut v, p, q);
            }
        }
    }
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by(|&a, &b| m[b][b].total_cmp(&m[a][a]).then(a.cmp(&b)));
    order
        .into_iter()
        .map(|c| v.iter().map(|row| row[c]).collect())
        .collect()
}

/// Makes `m[p][q]` 0 by a rotation of the two axes; `v` collects the rotations in its columns.
fn rotate(m: &mut [Vec<f64>], v: &mut [Vec<f64>], p: usize, q: usize) {
    if m[p][q] == 0.0 {
        return;
    }
    let theta = (m[q][q] - m[p][p]) / (2.0 * m[p][q]);
    let t = theta.signum() / (theta.abs() + libm::sqrt(theta * theta + 1.0));
    // Equal diagonal entries: a rotation by 45 degrees.
    let t = if theta == 0.0 { 1.0 } else { t };
    let c = 1.0 / libm::sqrt(t * t + 1.0);
    let s = t * c;
    for row in m.iter_mut().chain(v.iter_mut()) {
        let (x, y) = (row[p], row[q]);
        row[p] = c * x - s * y;
        row[q] = s * x + c * y;
    }
    let (low, high) = m.split_at_mut(q);
    for (x, y) in low[p].iter_mut().zip(&mut high[0]) {
        let (a, b) = (*x, *y);
        *x = c * a - s * b;
        *y = s * a + c * b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(m: &[Vec<f64>], v: &[f64]) -> Vec<f64> {
        m.iter()
            .map(|row| row.iter().zip(v).map(|(a, b)| a * b).sum())
            .collect()
    }

    #[test]
    fn eigenvectors_are_unit_and_are_turned_by_nothing() {
        let m = vec![
            vec![4.0, 1.0, -2.0, 0.5],
            vec![1.0, 3.0, 0.25, 1.0],
            vec![-2.0, 0.25, 5.0, -1.0],
            vec![0.5, 1.0, -1.0, 2.0],
        ];
        let vectors = eigenvectors(m.clone());
        let mut last = f64::INFINITY;
        for v in &vectors {
            let image = product(&m, v);
            let value: f64 = image.iter().zip(v).map(|(a, b)| a * b).sum();
            assert!(value <= last, "eigenvalues fall");
            last = value;
            for (a, b) in image.iter().zip(v) {
                assert!((a - value * b).abs() < 1e-12);
            }
            assert!((v.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn a_shared_direction_survives_and_the_rest_goes() {
        // Two experts agree up to scale, the third is orthogonal to them and weaker.
        let shared = [1.0, -2.0, 3.0, 0.0];
        let other = [0.0, 0.0, 0.0, 0.5];
        let mut rows = vec![
            shared.to_vec(),
            shared.iter().map(|x| 2.0 * x).collect(),
            other.to_vec(),
        ];
        let before = rows.clone();
        project(&mut rows, 1);
        for (row, was) in rows.iter().zip(&before).take(2) {
            for (x, y) in row.iter().zip(was) {
                assert!((x - y).abs() < 1e-12);
            }
        }
        assert!(rows[2].iter().all(|x| x.abs() < 1e-12));
        let mut whole = before.clone();
        project(&mut whole, 3);
        assert_eq!(whole, before);
    }
}
