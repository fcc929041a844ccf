// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "check.h"
#include "lib/console.h"

static enum { GOING, FAILED, SKIPPED } state;
static unsigned number, passed, failed, skipped;
static const struct check_group *current_group;
static const struct check *current;

static void print_head(const char *outcome)
{
    print("%s %02u %s: %s", outcome, number, current_group->name, current->description);
}

void check_fail(const char *format, ...)
{
    va_list arguments;

    if (state != GOING)
        return;
    state = FAILED;
    failed++;
    print_head("FAIL");
    print(": ");
    va_start(arguments, format);
    print_list(format, arguments);
    va_end(arguments);
    print("\n");
}

void check_skip(const char *why)
{
    if (state != GOING)
        return;
    state = SKIPPED;
    skipped++;
    print_head("skip");
    print(": %s\n", why);
}

bool check_is_over(void)
{
    return state != GOING;
}

void check_run(const struct check_group *group)
{
    current_group = group;
    for (unsigned n = 0; n < group->count; n++) {
        current = &group->checks[n];
        state = GOING;
        number++;
        if (group->setup)
            group->setup();
        if (state == GOING)
            current->run();
        if (group->teardown)
            group->teardown();
        if (state == GOING) {
            passed++;
            print_head("ok");
            print("\n");
        }
    }
}

bool check_summary(void)
{
    print("%u passed, %u failed, %u skipped\n", passed, failed, skipped);
    return failed == 0;
}
