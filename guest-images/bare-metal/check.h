// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The harness: numbered checks, one line each.
//
// A check's function returns having called neither `check_fail` nor `check_skip` when all was well;
// the macros below leave it at the first thing that is not.
#pragma once
#include "lib/types.h"

struct check {
    const char *description;
    void (*run)(void);
};

struct check_group {
    const char *name;
    const struct check *checks;
    unsigned count;
    // Run before and after each check. `setup` may fail or skip in the check's name.
    void (*setup)(void);
    void (*teardown)(void);
};

#define CHECK_GROUP(group_name, list, setup_function, teardown_function)                              \
    const struct check_group group_name##_checks = {#group_name, list, ARRAY_LEN(list), setup_function, \
                                                    teardown_function}

void check_run(const struct check_group *group);

// Prints the summary; true when nothing failed.
bool check_summary(void);

// Says how the running check ended; the first one counts.
__attribute__((format(printf, 1, 2))) void check_fail(const char *format, ...);
void check_skip(const char *why);
bool check_is_over(void);

#define EXPECT(condition, ...)                                                                        \
    do {                                                                                              \
        if (!(condition)) {                                                                           \
            check_fail(__VA_ARGS__);                                                                  \
            return;                                                                                   \
        }                                                                                             \
    } while (0)

// For helpers that have said themselves what was wrong.
#define REQUIRE(helper)                                                                               \
    do {                                                                                              \
        if (!(helper))                                                                                \
            return;                                                                                   \
    } while (0)

#define SKIP_UNLESS(condition, why)                                                                   \
    do {                                                                                              \
        if (!(condition)) {                                                                           \
            check_skip(why);                                                                          \
            return;                                                                                   \
        }                                                                                             \
    } while (0)
