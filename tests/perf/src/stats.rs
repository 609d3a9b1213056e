//! Medians, spreads, ratios with an interval, and slopes. Knows nothing of what was measured.

use serde::Serialize;

/// What is reported of a series of measurements, in the unit of its values.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) count: usize,
    pub(crate) median: f64,
    /// First and third quartile.
    pub(crate) quartiles: [f64; 2],
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Summary {
    /// Of nothing there is no summary.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            count: sorted.len(),
            median: quantile(&sorted, 0.5)?,
            quartiles: [quantile(&sorted, 0.25)?, quantile(&sorted, 0.75)?],
            min: *sorted.first()?,
            max: *sorted.last()?,
        })
    }
}

/// The quantile of sorted values, interpolated.
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let at = share * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(low + (high - low) * at.fract())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    quantile(values, 0.5).unwrap_or(f64::NAN)
}

/// A ratio of two medians with its 95 % interval.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Ratio {
    pub(crate) ratio: f64,
    pub(crate) interval: [f64; 2],
}

impl Ratio {
    /// Median of `over` by median of `under`. The values of one round are drawn together, because what disturbed
    /// one of them disturbed its neighbour too.
    pub(crate) fn of(over: &[f64], under: &[f64]) -> Option<Self> {
        const DRAWS: usize = 2000;
        let rounds = over.len().min(under.len());
        if rounds == 0 {
            return None;
        }
        let ratio = median(&mut over.to_vec()) / median(&mut under.to_vec());
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
        let mut drawn: Vec<f64> = (0..DRAWS)
            .map(|_| {
                let picks: Vec<usize> = (0..rounds).map(|_| dice.below(rounds)).collect();
                let of =
                    |values: &[f64]| median(&mut picks.iter().map(|pick| values[*pick]).collect::<Vec<_>>());
                of(over) / of(under)
            })
            .collect();
        drawn.sort_by(f64::total_cmp);
        Some(Self { ratio, interval: [quantile(&drawn, 0.025)?, quantile(&drawn, 0.975)?] })
    }
}

/// A fixed sequence (xorshift64*), so that the same measurements give the same interval.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}

/// The slope of the least-squares line through the points.
pub(crate) fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let count = points.len() as f64;
    let mean = |pick: fn(&(f64, f64)) -> f64| points.iter().map(pick).sum::<f64>() / count;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let spread: f64 = points.iter().map(|p| (p.0 - x).powi(2)).sum();
    (spread > 0.0).then(|| points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum::<f64>() / spread)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_interpolates() {
        let summary = Summary::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((summary.median, summary.quartiles), (2.5, [1.75, 3.25]));
        assert_eq!((summary.min, summary.max, summary.count), (1.0, 4.0, 4));
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn a_ratio_lies_in_its_interval() {
        let under: Vec<f64> = (0..20).map(|n| 1.0 + f64::from(n % 5) / 10.0).collect();
        let over: Vec<f64> = under.iter().map(|value| value * 3.0).collect();
        let ratio = Ratio::of(&over, &under).unwrap();
        assert!((ratio.ratio - 3.0).abs() < 1e-9, "{ratio:?}");
        assert!(ratio.interval[0] <= ratio.ratio && ratio.ratio <= ratio.interval[1], "{ratio:?}");
        assert_eq!(Ratio::of(&over, &under), Ratio::of(&over, &under));
        assert_eq!(Ratio::of(&[], &under), None);
    }

    #[test]
    fn a_slope_is_the_lines() {
        assert_eq!(slope(&[(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)]), Some(2.0));
        assert_eq!(slope(&[(1.0, 5.0)]), None);
    }
}
