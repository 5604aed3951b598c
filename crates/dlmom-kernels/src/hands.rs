//! The threads that work on a row or a batch.

use std::sync::{Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

use crate::tier::Available;

/// The caller's thread and its helpers.
#[derive(Debug, Default)]
pub(crate) struct Helpers(Option<ThreadPool>);

impl Helpers {
    pub(crate) fn new(threads: usize) -> Result<Self, ThreadPoolBuildError> {
        let helpers = threads.saturating_sub(1);
        let start = || {
            ThreadPoolBuilder::new()
                .num_threads(helpers)
                .thread_name(|index| format!("dlmom-kernel-{index}"))
                .build()
        };
        Ok(Self((helpers > 0).then(start).transpose()?))
    }
}

/// Who works on a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hands<'a> {
    pub(crate) tier: Available,
    helpers: Option<&'a ThreadPool>,
}

impl<'a> Hands<'a> {
    pub(crate) fn new(tier: Available, helpers: &'a Helpers) -> Self {
        let helpers = helpers.0.as_ref();
        Self { tier, helpers }
    }

    /// The caller's thread alone.
    pub(crate) fn alone(tier: Available) -> Self {
        let helpers = None;
        Self { tier, helpers }
    }

    pub(crate) fn count(self) -> usize {
        1 + self.helpers.map_or(0, ThreadPool::current_num_threads)
    }

    /// Does every task, each with the state of whoever takes it: one per thread.
    ///
    /// The caller works too, and takes what is left while its helpers wake up.
    pub(crate) fn share<S: Send, T: Send>(
        self,
        states: &mut [S],
        mut tasks: impl Iterator<Item = T> + Send,
        work: impl Fn(&mut S, T) + Sync,
    ) {
        let Some((own, others)) = states.split_first_mut() else {
            return;
        };
        let Some(pool) = self.helpers else {
            return tasks.for_each(|task| work(own, task));
        };
        let queue = Mutex::new(&mut tasks);
        let drain = |state: &mut S| {
            let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            while let Some(task) = next() {
                work(state, task);
            }
        };
        pool.in_place_scope(|scope| {
            for state in others {
                scope.spawn(|_| drain(state));
            }
            drain(own);
        });
    }

    /// [`Hands::share`] of tasks that need no state.
    pub(crate) fn each<T: Send>(
        self,
        tasks: impl Iterator<Item = T> + Send,
        work: impl Fn(T) + Sync,
    ) {
        let mut states = vec![(); self.count()];
        self.share(&mut states, tasks, |(), task| work(task));
    }
}
