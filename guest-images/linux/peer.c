// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The peer of the guest's bulk transfers: peer PORT serves them one after another, until it is
// killed.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "bulk.h"

static bool serve(int stream)
{
    struct bulk_request request;
    uint64_t right;

    return bulk_read(stream, &request, sizeof(request)) && request.magic == BULK_MAGIC &&
           request.size % BULK_CHUNK == 0 && bulk_receive(stream, request.size, request.seed_up, &right) &&
           bulk_write(stream, &right, sizeof(right)) && bulk_send(stream, request.size, request.seed_down);
}

int main(int count, char **arguments)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(count > 1 ? atoi(arguments[1]) : 7000)};
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);

    signal(SIGPIPE, SIG_IGN);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(listener, 4) < 0) {
        perror("peer");
        return 1;
    }
    for (;;) {
        int stream = accept(listener, NULL, NULL);
        if (stream < 0)
            continue;
        if (!serve(stream))
            fprintf(stderr, "peer: a transfer broke off\n");
        close(stream);
    }
}
