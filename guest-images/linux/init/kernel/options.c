// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The words of /proc/cmdline; the last is NULL. Quotes are not interpreted.
static char **words(void)
{
    static char text[4096], *all[256];
    unsigned count = 0;

    if (all[0])
        return all;
    FILE *file = fopen("/proc/cmdline", "re");
    if (!file)
        return all;
    text[fread(text, 1, sizeof(text) - 1, file)] = '\0';
    fclose(file);
    for (char *word = strtok(text, " \n"); word && count < 255; word = strtok(NULL, " \n"))
        all[count++] = word;
    return all;
}

const char *option(const char *name, const char *otherwise)
{
    char prefix[64];
    int length = snprintf(prefix, sizeof(prefix), "twostage.%s=", name);
    const char *value = otherwise;

    // The last one counts, as for the kernel's own options.
    for (char **word = words(); *word; word++)
        if (strncmp(*word, prefix, (size_t)length) == 0)
            value = *word + length;
    return value;
}

unsigned long option_number(const char *name, unsigned long otherwise)
{
    const char *text = option(name, NULL);

    return text ? strtoul(text, NULL, 0) : otherwise;
}

bool on_command_line(const char *wanted)
{
    for (char **word = words(); *word; word++)
        if (strcmp(*word, wanted) == 0)
            return true;
    return false;
}
