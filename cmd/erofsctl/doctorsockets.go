package main

import (
	"context"
	"net"
)

// dialUnix says why nobody answers at a socket.
func dialUnix(ctx context.Context, path string) error {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return err
	}
	return c.Close()
}
