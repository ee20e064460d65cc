// Command mkrootfs builds the root file system of demo and bench, and prints
// the path of its tar file.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/erofsd/erofsd/kernel-tests/rootfs"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	image, err := rootfs.Build(ctx, func(step string) { fmt.Fprintln(os.Stderr, step) })
	if err != nil {
		fmt.Fprintln(os.Stderr, "mkrootfs:", err)
		os.Exit(1)
	}
	fmt.Println(image.Tar)
}
