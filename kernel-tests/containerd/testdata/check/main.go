// Command check is what runs in containers: it prints one digest of all files in /data. With
// the argument wait it says that it runs, and reads them when its standard input ends.
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "wait" {
		fmt.Println("waits")
		if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	if err := os.WriteFile("/data/new", nil, 0o600); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	all := sha256.New()
	err := filepath.WalkDir("/data", func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || d.Name() == "new" {
			return err
		}
		p, err := os.ReadFile(name)
		fmt.Fprintf(all, "%s %x\n", name, sha256.Sum256(p))
		return err
	})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Printf("read %x\n", all.Sum(nil))
}
