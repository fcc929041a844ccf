// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "lib/cmdline.h"

static const char *cmdline = "";

void cmdline_set(const char *text)
{
    cmdline = text;
}

static int digit(char c, unsigned base)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (base == 16 && c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (base == 16 && c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

static u64 parse_number(const char *text)
{
    unsigned base = 10;
    u64 value = 0;

    if (text[0] == '0' && (text[1] == 'x' || text[1] == 'X')) {
        base = 16;
        text += 2;
    }
    for (; digit(*text, base) >= 0; text++)
        value = value * base + (u64)digit(*text, base);
    return value;
}

u64 cmdline_number(const char *name, u64 fallback)
{
    const char *word = cmdline;

    while (*word) {
        const char *wanted = name, *c = word;

        while (*wanted && *c == *wanted) {
            c++;
            wanted++;
        }
        if (!*wanted && *c == '=')
            return parse_number(c + 1);
        while (*word && *word != ' ')
            word++;
        while (*word == ' ')
            word++;
    }
    return fallback;
}
