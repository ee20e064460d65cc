// Command hit hits the place of its first argument as often as its second says,
// and prints how often that was.
package main

import (
	"fmt"
	"os"
	"strconv"

	"github.com/erofsd/erofsd/internal/failpoint"
)

func main() {
	n, err := strconv.Atoi(os.Args[2])
	if err != nil {
		panic(err)
	}
	for range n {
		failpoint.Hit(os.Args[1])
	}
	fmt.Println(n)
}
