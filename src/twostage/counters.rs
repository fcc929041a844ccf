// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counter structures whose fields are written once, see [`counters!`].
//!
//! [`counters!`]: crate::counters!

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that any thread may increment and read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn count(&self) {
        self.add(1);
    }

    /// Adds `number`.
    pub fn add(&self, number: u64) {
        self.0.fetch_add(number, Ordering::Relaxed);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A structure of numbers, for reports.
pub trait CounterSet {
    /// Names and numbers, in the order of the fields.
    fn each(&self) -> Vec<(&'static str, u64)>;
}

/// Declares a structure of counters with documented field names; all of them are `u64`, implement
/// [`CounterSet`], and can be summed.
///
/// * `struct Name; running struct Running of Counter { … }` declares a second one for counting: its
///   fields are `Counter`s, and `snapshot` reads them.
/// * `struct Name from Totals { … }` converts from another structure; a field with another name
///   there is written `name = there`.
///
/// ```
/// use twostage::counters::{Counter, CounterSet};
///
/// twostage::counters! {
///     /// What was done.
///     pub struct Work;
///     /// What is done just now.
///     running struct Working of Counter {
///         /// Requests.
///         requests,
///         /// Those refused.
///         refused,
///     }
/// }
/// let working = Working::default();
/// working.requests.add(2);
/// working.refused.count();
/// assert_eq!(working.snapshot().each(), [("requests", 2), ("refused", 1)]);
/// ```
#[macro_export]
macro_rules! counters {
    (@of $from:ident $field:ident) => { $from.$field };
    (@of $from:ident $field:ident $there:ident) => { $from.$there };
    (
        $(#[$meta:meta])* $vis:vis struct $name:ident;
        $(#[$running_meta:meta])* running $running_vis:vis struct $running:ident of $counter:ty {
            $($(#[$doc:meta])* $field:ident),* $(,)?
        }
    ) => {
        $crate::counters! { $(#[$meta])* $vis struct $name { $($(#[$doc])* $field),* } }

        $(#[$running_meta])*
        #[derive(Debug, Default)]
        $running_vis struct $running {
            $($(#[$doc])* pub $field: $counter,)*
        }

        impl $running {
            /// The values: each is read on its own, so they are not a snapshot.
            pub fn snapshot(&self) -> $name {
                $name { $($field: self.$field.get(),)* }
            }
        }
    };
    (
        $(#[$meta:meta])* $vis:vis struct $name:ident from $totals:ident {
            $($(#[$doc:meta])* $field:ident $(= $there:ident)?),* $(,)?
        }
    ) => {
        $crate::counters! { $(#[$meta])* $vis struct $name { $($(#[$doc])* $field),* } }

        impl From<$totals> for $name {
            fn from(totals: $totals) -> Self {
                Self { $($field: $crate::counters!(@of totals $field $($there)?),)* }
            }
        }
    };
    (
        $(#[$meta:meta])* $vis:vis struct $name:ident {
            $($(#[$doc:meta])* $field:ident),* $(,)?
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        $vis struct $name {
            $($(#[$doc])* pub $field: u64,)*
        }

        impl $crate::counters::CounterSet for $name {
            fn each(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field),)*]
            }
        }

        impl std::ops::AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                $(self.$field += other.$field;)*
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    crate::counters! {
        /// All.
        struct Totals;
        /// While they are counted.
        running struct Running of Counter {
            /// One.
            one,
            /// Two.
            two,
        }
    }

    crate::counters! {
        /// By other names.
        struct Named from Totals {
            /// Two.
            second = two,
            /// One.
            one,
        }
    }

    #[test]
    fn what_is_counted_has_a_name_and_adds_up() {
        let running = Running::default();
        running.one.count();
        running.two.add(5);
        let mut totals = running.snapshot();
        assert_eq!(totals, Totals { one: 1, two: 5 });
        totals += running.snapshot();
        assert_eq!(totals.each(), [("one", 2), ("two", 10)]);
        assert_eq!(Named::from(totals).each(), [("second", 10), ("one", 2)]);
    }
}
