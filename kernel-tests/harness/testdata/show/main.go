// Command show prints what a program inside a container sees.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Println("pid", os.Getpid())
	fmt.Print("root")
	entries, err := os.ReadDir("/")
	for _, e := range entries {
		fmt.Print(" ", e.Name())
	}
	fmt.Println()
	if err != nil {
		fmt.Println(err)
	}
	fmt.Println("writable", os.WriteFile("/written", nil, 0o644) == nil)
}
