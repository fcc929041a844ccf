// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Bounded waiting, on the clock that each guest's `lib/io.h` has: `timestamp` and `patience` in its
// ticks, and `relax` for each turn.
#pragma once
#include "lib/io.h"

// Whether `condition` came true in time.
#define WAIT_UNTIL(condition)                                              \
    ({                                                                     \
        u64 wait_started_ = timestamp();                                   \
        bool wait_done_;                                                   \
        while (!(wait_done_ = (condition)) &&                              \
               timestamp() - wait_started_ < patience())                   \
            relax();                                                       \
        wait_done_;                                                        \
    })
