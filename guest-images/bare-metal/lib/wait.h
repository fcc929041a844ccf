// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Waiting for something to happen, with a limit in real time that is long beside whatever a machine has
// else to do. The clock is each guest's own: `timestamp` in its `lib/io.h`, `clock_frequency` and `relax`.
#pragma once
#include "lib/io.h"

// The limit in seconds. Whatever is waited for is there long before, or never: `patience=` on the command line makes
// it shorter where much is known to come never.
u64 patience(void);

// Ticks of `timestamp` in a second.
u64 clock_frequency(void);

// Whether the limit of a wait that began at `started` is not over; says in a line that `what` did not happen
// when it is.
bool wait_goes_on(u64 started, const char *what);

// Whether `condition` came true in time.
#define WAIT_UNTIL(condition)                                              \
    ({                                                                     \
        u64 wait_started_ = timestamp();                                   \
        bool wait_done_;                                                   \
        while (!(wait_done_ = (condition)) &&                              \
               wait_goes_on(wait_started_, #condition))                    \
            relax();                                                       \
        wait_done_;                                                        \
    })
