// Command mkkernel builds guest kernels, the given rows or all, and prints the path
// of each.
package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/erofsd/erofsd/kernel-tests/guestkernel"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	rows := cmp.Or(strings.Join(os.Args[1:], " "), strings.Join(guestkernel.Rows, " "))
	for row := range strings.FieldsSeq(rows) {
		kernel, err := guestkernel.Build(ctx, row, func(step string) { fmt.Fprintln(os.Stderr, step) })
		if err != nil {
			fmt.Fprintln(os.Stderr, "mkkernel:", err)
			os.Exit(1)
		}
		fmt.Println(kernel.Image)
	}
}
