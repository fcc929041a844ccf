// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "kernel_log.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>

enum { READ_ALL = 3, SIZE_BUFFER = 10 };

static bool contains_one(const char *line, const char *const *needles)
{
    for (; *needles; needles++)
        if (strstr(line, *needles))
            return true;
    return false;
}

unsigned log_lines(const char *const *needles, void (*each)(const char *line))
{
    unsigned count = 0;
    int size = klogctl(SIZE_BUFFER, NULL, 0);
    char *log = size > 0 ? malloc((size_t)size + 1) : NULL;
    if (!log)
        return 0;
    int length = klogctl(READ_ALL, log, size);
    log[length > 0 ? length : 0] = '\0';

    char *rest;
    for (char *line = strtok_r(log, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        char *text = strstr(line, "] ");
        if (!contains_one(line, needles))
            continue;
        count++;
        if (each)
            each(text ? text + 2 : line);
    }
    free(log);
    return count;
}

unsigned log_count(const char *needle)
{
    const char *const needles[] = {needle, NULL};

    return log_lines(needles, NULL);
}
