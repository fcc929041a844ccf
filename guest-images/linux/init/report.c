// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "report.h"

#include <stdarg.h>
#include <stdio.h>
#include <termios.h>
#include <unistd.h>

#include "watch.h"

static struct {
    unsigned passed, failed, skipped;
} count;

static void line(const char *verdict, const char *check, const char *format, va_list arguments)
{
    printf("%s%s%s", verdict, check, check[0] ? ": " : "");
    vprintf(format, arguments);
    printf("\n");
    result_reported();
}

#define SAY(verdict, check)              \
    do {                                 \
        va_list arguments;               \
        va_start(arguments, format);     \
        line(verdict, check, format, arguments); \
        va_end(arguments);               \
    } while (0)

void passed(const char *check, const char *format, ...)
{
    count.passed++;
    SAY("ok ", check);
}

void failed(const char *check, const char *format, ...)
{
    count.failed++;
    SAY("FAIL ", check);
}

void skipped(const char *check, const char *format, ...)
{
    count.skipped++;
    SAY("skip ", check);
}

void note(const char *format, ...)
{
    SAY("# ", "");
}

unsigned summary(void)
{
    printf("%u passed, %u failed, %u skipped\n", count.passed, count.failed, count.skipped);
    return count.failed;
}

void flush_report(void)
{
    fflush(stdout);
    tcdrain(STDOUT_FILENO);
}
