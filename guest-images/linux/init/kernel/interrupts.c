// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "interrupts.h"

#include <stdio.h>
#include <string.h>

unsigned for_each_interrupt(const char *needle, void (*each)(const char *, unsigned long, void *), void *context)
{
    char line[1024];
    unsigned found = 0;
    FILE *file = fopen("/proc/interrupts", "re");

    while (file && fgets(line, sizeof(line), file)) {
        unsigned long count, counts = 0;
        char *at = strchr(line, ':');
        int length;

        if (!at || !strstr(line, needle))
            continue;
        line[strcspn(line, "\n")] = '\0';
        // One column for each processor.
        for (at++; sscanf(at, " %lu%n", &count, &length) == 1; at += length)
            counts += count;
        found++;
        each(at + strspn(at, " "), counts, context);
    }
    if (file)
        fclose(file);
    return found;
}

static void add(const char *text, unsigned long count, void *context)
{
    unsigned long *sum = context;

    (void)text;
    *sum += count;
}

unsigned long interrupt_count(const char *needle)
{
    unsigned long sum = 0;

    for_each_interrupt(needle, add, &sum);
    return sum;
}
