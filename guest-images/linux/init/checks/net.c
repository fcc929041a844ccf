// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// twostage.net.address=ADDRESS/LENGTH is the guest's address, twostage.net.host=ADDRESS the peer's,
// where peer.c listens at twostage.net.port.
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <net/if.h>
#include <netinet/ip_icmp.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../../bulk.h"
#include "../devices/devices.h"
#include "../kernel/files.h"
#include "../kernel/options.h"
#include "../report.h"
#include "checks.h"

#define MIB ((uint64_t)1 << 20)
enum { PINGS = 5, PING_BYTES = 1024 };

static struct sockaddr_in host_address(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(option_number("net.port", 7000))};

    inet_pton(AF_INET, option("net.host", "192.0.2.1"), &address.sin_addr);
    return address;
}

// NULL, or the error.
static const char *configure(const char *interface)
{
    char text[64];
    struct ifreq request = {0};
    struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
    int any = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    const char *wrong = NULL;

    snprintf(text, sizeof(text), "%s", option("net.address", "192.0.2.2/24"));
    char *length = strchr(text, '/');
    if (length)
        *length++ = '\0';
    unsigned bits = length ? (unsigned)atoi(length) : 24;

    snprintf(request.ifr_name, IFNAMSIZ, "%s", interface);
    address->sin_family = AF_INET;
    if (any < 0 || inet_pton(AF_INET, text, &address->sin_addr) != 1 || bits < 1 || bits > 32)
        wrong = "twostage.net.address is no address";
    else if (ioctl(any, SIOCSIFADDR, &request) < 0)
        wrong = strerror(errno);
    address->sin_addr.s_addr = htonl(~UINT32_C(0) << (32 - bits));
    if (!wrong && ioctl(any, SIOCSIFNETMASK, &request) < 0)
        wrong = strerror(errno);
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (!wrong && ioctl(any, SIOCSIFFLAGS, &request) < 0)
        wrong = strerror(errno);
    close(any);
    return wrong;
}

static uint16_t icmp_checksum(const void *data, size_t size)
{
    uint32_t sum = 0;

    for (size_t i = 0; i < size; i += 2) {
        uint16_t word;
        memcpy(&word, (const char *)data + i, 2);
        sum += word;
    }
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~(sum + (sum >> 16));
}

// One echo request and its reply. Returns the time in seconds, or a negative number.
static double ping(int raw, uint16_t sequence)
{
    struct {
        struct icmphdr header;
        char data[PING_BYTES];
    } request = {.header = {.type = ICMP_ECHO, .un.echo = {.id = htons(0x2457), .sequence = htons(sequence)}}};
    char packet[60 + sizeof(request)];
    struct sockaddr_in host = host_address();
    double start = now();

    pattern_fill(request.data, PING_BYTES, 7, sequence);
    request.header.checksum = icmp_checksum(&request, sizeof(request));
    if (sendto(raw, &request, sizeof(request), 0, (struct sockaddr *)&host, sizeof(host)) < 0)
        return -1;
    while (now() - start < PATIENCE_S) {
        ssize_t length = recv(raw, packet, sizeof(packet), 0);
        if (length < 20)
            return -1;
        size_t header = (size_t)(packet[0] & 15) * 4;
        struct icmphdr reply;
        if ((size_t)length != header + sizeof(request))
            continue;
        memcpy(&reply, packet + header, sizeof(reply));
        if (reply.type == ICMP_ECHOREPLY && reply.un.echo.id == request.header.un.echo.id &&
            reply.un.echo.sequence == request.header.un.echo.sequence)
            return memcmp(packet + header + sizeof(reply), request.data, PING_BYTES) == 0 ? now() - start : -1;
    }
    errno = ETIMEDOUT;
    return -1;
}

// Number of `count` pings with a correct reply; the time of the last in *seconds.
static unsigned pings(unsigned count, double *seconds)
{
    struct timeval timeout = {.tv_sec = PATIENCE_S};
    int raw = socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_ICMP);
    unsigned answered = 0;

    if (raw < 0)
        return 0;
    setsockopt(raw, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
    for (unsigned i = 0; i < count; i++) {
        double took = ping(raw, (uint16_t)i);
        if (took < 0)
            continue;
        answered++;
        *seconds = took;
    }
    close(raw);
    return answered;
}

// Sends, then receives, `size` bytes. NULL, or the error.
static const char *transfer(uint64_t size, double seconds[static 2])
{
    struct timeval timeout = {.tv_sec = PATIENCE_S};
    struct sockaddr_in host = host_address();
    struct bulk_request request = {BULK_MAGIC, size, 11, 12};
    uint64_t received_there, wrong_at;
    const char *wrong = NULL;

    int stream = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(stream, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
    setsockopt(stream, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
    double start = now();
    if (stream < 0 || connect(stream, (struct sockaddr *)&host, sizeof(host)) < 0)
        wrong = strerror(errno);
    else if (!bulk_write(stream, &request, sizeof(request)) || !bulk_send(stream, size, request.seed_up) ||
             !bulk_read(stream, &received_there, sizeof(received_there)))
        wrong = "the connection broke while sending";
    else if (received_there != size)
        wrong = "what the peer received differs from what was sent";
    seconds[0] = now() - start;
    start = now();
    if (!wrong && !bulk_receive(stream, size, request.seed_down, &wrong_at))
        wrong = "the connection broke while receiving";
    else if (!wrong && wrong_at != size)
        wrong = "what was received differs from what the peer sent";
    seconds[1] = now() - start;
    close(stream);
    return wrong;
}

void check_net(void)
{
    struct device device;
    double seconds[2] = {0};
    uint64_t size = option_number("net.mib", 16) * MIB;

    if (!find_device("virtio_net", &device)) {
        failed("net", "there is no virtio network device");
        return;
    }
    const char *wrong = configure(device.node);
    if (wrong) {
        failed("net", "%s: %s", device.node, wrong);
        return;
    }
    unsigned answered = pings(PINGS, seconds);
    if (answered == PINGS)
        passed("net", "%s: %d pings to %s answered, the last in %.2f ms", device.node, PINGS,
               option("net.host", "192.0.2.1"), seconds[0] * 1e3);
    else
        failed("net", "%s: %u of %d pings to %s answered", device.node, answered, PINGS,
               option("net.host", "192.0.2.1"));
    if (!size)
        return;
    wrong = transfer(size, seconds);
    if (wrong)
        failed("net", "%s: bulk transfer: %s", device.node, wrong);
    else
        passed("net", "%s: %" PRIu64 " MiB sent in %.2f s (%.0f MiB/s), received in %.2f s (%.0f MiB/s)", device.node,
               size / MIB, seconds[0], (double)(size / MIB) / seconds[0], seconds[1], (double)(size / MIB) / seconds[1]);
}

const char *try_net(const char *interface)
{
    double seconds;
    const char *wrong = configure(interface);

    if (wrong)
        return wrong;
    return pings(1, &seconds) == 1 ? NULL : "no answer to a ping";
}
