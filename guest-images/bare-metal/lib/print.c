// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "lib/console.h"

static void put_string(const char *text)
{
    for (; *text; text++)
        put_char(*text);
}

static void put_number(u64 value, unsigned base, unsigned width)
{
    char digits[20];
    unsigned used = 0;

    do {
        digits[used++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    for (unsigned n = used; n < width; n++)
        put_char('0');
    while (used)
        put_char(digits[--used]);
}

void print_list(const char *format, va_list arguments)
{
    for (; *format; format++) {
        unsigned width = 0;
        bool is_long = false;

        if (*format != '%') {
            put_char(*format);
            continue;
        }
        format++;
        for (; *format >= '0' && *format <= '9'; format++)
            width = width * 10 + (unsigned)(*format - '0');
        for (; *format == 'l'; format++)
            is_long = true;
        switch (*format) {
        case 's':
            put_string(va_arg(arguments, const char *));
            break;
        case 'c':
            put_char((char)va_arg(arguments, int));
            break;
        case 'u':
        case 'x':
            put_number(is_long ? va_arg(arguments, u64) : va_arg(arguments, u32),
                       *format == 'x' ? 16 : 10, width);
            break;
        default:
            put_char(*format);
        }
    }
}

void print(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    print_list(format, arguments);
    va_end(arguments);
}
