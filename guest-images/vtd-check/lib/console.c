// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "console.h"
#include "io.h"

enum {
    COM1 = 0x3f8,
    TRANSMIT = COM1 + 0,
    INTERRUPT_ENABLE = COM1 + 1,
    FIFO_CONTROL = COM1 + 2,
    LINE_CONTROL = COM1 + 3,
    MODEM_CONTROL = COM1 + 4,
    LINE_STATUS = COM1 + 5,
    TRANSMIT_EMPTY = 1 << 5,
    DIVISOR_LATCH = 1 << 7,
    EIGHT_BITS = 3,
    EXIT_PORT = 0xf4,
};

void console_init(void)
{
    out8(INTERRUPT_ENABLE, 0);
    out8(LINE_CONTROL, DIVISOR_LATCH);
    out8(TRANSMIT, 1); // 115200 baud
    out8(INTERRUPT_ENABLE, 0);
    out8(LINE_CONTROL, EIGHT_BITS);
    out8(FIFO_CONTROL, 1);
    out8(MODEM_CONTROL, 3);
}

static void put_char(char c)
{
    // A port that never says "empty" must not hang the guest.
    for (int tries = 0; tries < 1000 && !(in8(LINE_STATUS) & TRANSMIT_EMPTY); tries++)
        ;
    out8(TRANSMIT, (u8)c);
}

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

void machine_exit(u8 code)
{
    out8(EXIT_PORT, code);
    for (;;)
        asm volatile("cli; hlt");
}
