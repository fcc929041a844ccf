// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "lib/wait.h"
#include "lib/cmdline.h"
#include "lib/console.h"

u64 patience(void)
{
    // Read once, as this is called in every iteration of a wait.
    static u64 seconds;

    if (!seconds)
        seconds = cmdline_number("patience", 60);
    return seconds;
}

bool wait_goes_on(u64 started, const char *what)
{
    if (timestamp() - started < patience() * clock_frequency())
        return true;
    print("# waited %lu s in vain: %s\n", patience(), what);
    return false;
}
