// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The harness: numbered checks, one line each.
//
// A check's function returns without calling `check_fail` or `check_skip` if it passes; the macros
// below return at the first failure.
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

#define CHECK_GROUP(group_name, list, setup_function, teardown_function)                          \
    const struct check_group group_name##_checks = {#group_name, list, ARRAY_LEN(list),           \
                                                    setup_function, teardown_function}

void check_run(const struct check_group *group);

// Prints the summary; true when nothing failed.
bool check_summary(void);

// Sets the result of the running check; the first call counts.
__attribute__((format(printf, 1, 2))) void check_fail(const char *format, ...);
void check_skip(const char *why);
bool check_is_over(void);

#define EXPECT(condition, ...)                                                                    \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            check_fail(__VA_ARGS__);                                                              \
            return;                                                                               \
        }                                                                                         \
    } while (0)

// For helpers that have already reported what was wrong.
#define REQUIRE(helper)                                                                           \
    do {                                                                                          \
        if (!(helper))                                                                            \
            return;                                                                               \
    } while (0)

#define SKIP_UNLESS(condition, why)                                                               \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            check_skip(why);                                                                      \
            return;                                                                               \
        }                                                                                         \
    } while (0)
