// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// A 16550 or a PL011, depending on the device tree; the machine is ended by PSCI.
#include "lib/console.h"
#include "lib/devicetree.h"
#include "lib/wait.h"

enum {
    UART_LINE_STATUS = 5,
    UART_TRANSMIT_EMPTY = 1 << 5,
    PL011_FLAGS = 0x18,
    PL011_TRANSMIT_FULL = 1 << 5,
};

#define PSCI_SYSTEM_OFF 0x84000008u

static u64 uart, pl011;

void console_init(void)
{
    uart = address_of("ns16550a");
    pl011 = uart ? 0 : address_of("arm,pl011");
}

static bool is_ready(void)
{
    return uart ? read8(uart + UART_LINE_STATUS) & UART_TRANSMIT_EMPTY : !(read8(pl011 + PL011_FLAGS) & PL011_TRANSMIT_FULL);
}

void put_char(char c)
{
    // A port that is never ready must not hang the guest: later output does not wait for it.
    static bool deaf;
    u64 started = timestamp();

    if (!uart && !pl011)
        return;
    while (!deaf && !is_ready())
        deaf = timestamp() - started > patience() * clock_frequency();
    write8(uart ? uart : pl011, (u8)c);
}

void machine_exit(u8 code)
{
    u32 length;
    const char *method = property_of_node("psci", "method", &length);
    register u64 function asm("x0") = PSCI_SYSTEM_OFF;

    // PSCI takes no status; the summary has it.
    (void)code;
    if (method && method[0] == 's')
        asm volatile("smc #0" : "+r"(function));
    else
        asm volatile("hvc #0" : "+r"(function));
    for (;;)
        asm volatile("wfi");
}
