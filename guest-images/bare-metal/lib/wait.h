// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Waiting for events, with a limit in real time that is generous even on a busy machine. The clock
// is provided by each guest: `timestamp` in its `lib/io.h`, `clock_frequency` and `relax`.
#pragma once
#include "lib/io.h"

// The limit in seconds. Events come long before, or never: `patience=` on the command line makes it
// shorter where many are known never to come.
u64 patience(void);

// Ticks of `timestamp` per second.
u64 clock_frequency(void);

// Whether a wait that started at `started` is within the limit; otherwise prints a line that `what`
// did not happen.
bool wait_goes_on(u64 started, const char *what);

// Whether `condition` became true in time.
#define WAIT_UNTIL(condition)                                              \
    ({                                                                     \
        u64 wait_started_ = timestamp();                                   \
        bool wait_done_;                                                   \
        while (!(wait_done_ = (condition)) &&                              \
               wait_goes_on(wait_started_, #condition))                    \
            relax();                                                       \
        wait_done_;                                                        \
    })
