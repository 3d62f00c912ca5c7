#include <torchgraft/config/composition_string.h>
#include <torchgraft/config/composition_tasks.h>

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

namespace torchgraft {
namespace {

std::string error_of(const std::string& text) {
  try {
    composition_from_string(text);
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

TEST(Composition, TextAndJsonGoBothWays) {
  for (const std::string text :
       {"Stack(en, ner)", "Stack(en, Average(a, b), Split(c, d, splits=[3,4]))",
        "BatchSplit(a, Stack(b, c), batch_sizes=[1,2])", "Average(a, b, weights=[0.25,0.75])",
        "Average(a, b, weights=[1.0,2.0], normalize_weights=False)", "Stack('two words', Fuse(a, b, name='a name'))",
        R"(Stack("it's", 'say "x"', "it's ""both""", "'"))"}) {
    const Composition composition = composition_from_string(text);
    EXPECT_EQ(composition_to_string(composition), text);
    EXPECT_EQ(composition_to_string(composition_from_json(composition_to_json(composition))), text);
  }
}

TEST(Composition, NumbersAreThoseOfTheLibrarysConstructors) {
  EXPECT_EQ(composition_from_string("Average(a, b, weights=[1, 3])").weights, (std::vector<double>{0.25, 0.75}));
  EXPECT_EQ(composition_from_string("Average(a, b)").weights, (std::vector<double>{0.5, 0.5}));
  EXPECT_EQ(composition_from_string("Split(a, b, splits=4)").sizes, (std::vector<int64_t>{4, 4}));
  EXPECT_EQ(composition_to_string(composition_from_string(" en ")), "Stack(en)");
}

TEST(Composition, NamesOfAdapters) {
  const Composition composition = composition_from_string("Stack(a, Fuse(b, Stack(c, a)), d)");
  EXPECT_EQ(adapters_in(composition), (std::vector<std::string>{"a", "b", "c", "d"}));
  EXPECT_EQ(first_adapter(composition.children[1]), "b");
  EXPECT_EQ(last_adapter(composition.children[1]), "a");
  EXPECT_EQ(fusion_name(composition.children[1]), "b,a");
  const Composition renamed = with_renamed(composition, "a", "x");
  EXPECT_EQ(composition_to_string(renamed), "Stack(x, Fuse(b, Stack(c, x), name='b,a'), d)");
}

TEST(Composition, WhatTheLibraryRefusesIsNamed) {
  const std::vector<std::pair<std::string, std::string>> wrong = {
      {"Stack(Stack(a, b), c)", "cannot nest Stack(a, b) inside Stack"},
      {"Fuse(a, Average(b, c))", "cannot nest Average(b, c) inside Fuse"},
      {"Average(Stack(a, Average(b, c)), d)", "too deep"},
      {"Split(a, Split(b, Split(c, d, splits=1), splits=2), splits=4)", "too deep"},
      {"Stack()", "Stack has no adapters"},
      {"Average(a, b, weights=[1])", "as many weights"},
      {"Average(a, b, weights=[1, -1])", "sum to 0"},
      {"Average(a, b, weights=[true, 1])", "expected weights[] to be a number, got true"},
      {"Average(a, b, normalize_weights=Trueish)", "composition: Trueish: not JSON"},
      {"Average(a, b, normalize_weights=1)", "expected normalize_weights to be true or false, got 1"},
      {"Split(a, b, splits=[1, true])", "expected splits[] to be an integer, got true"},
      {"Split(a, b)", "splits with a number for each of the 2 children"},
      {"BatchSplit(a, b, batch_sizes=[1, -2])", "batch_sizes from 0 to 2^31, got -2"},
      {"Stack(a, b", "a comma or a closing bracket"},
      {"Stack(a b)", "a comma or a closing bracket"},
      {"Stack(a) b", "nothing more"},
      {"Stack(a, 'b)", "a quote that ends"},
      {"", "the name of an adapter"},
      {"Heap(a)", "no block is called 'Heap'"},
      {"Stack(a, splits=3)", "Stack has no argument 'splits'"}};
  for (const auto& [text, message] : wrong) {
    EXPECT_NE(error_of(text).find(message), std::string::npos) << text << ": " << error_of(text);
  }
  EXPECT_NE(error_of("Stack(" + std::string(100000, '(')).find("composition"), std::string::npos);
  std::string deep = "a";
  for (int i = 0; i < 5000; ++i) {
    deep = "Stack(" + deep + ")";
  }
  EXPECT_NE(error_of(deep).find("fewer levels"), std::string::npos);
  std::string wide = "Stack(a";
  for (int i = 0; i < 64; ++i) {
    wide += ", a";
  }
  EXPECT_NE(error_of(wide + ")").find("at most 64 adapters"), std::string::npos);
}

TEST(Composition, TasksAreTheCompositionWithOneChildOfEachMultiTask) {
  const auto tasks = [](const char* text) {
    std::vector<std::string> texts;
    for (const Composition& task : tasks_of(composition_from_string(text))) {
      texts.push_back(task.kind == BlockKind::kAdapter ? task.name : composition_to_string(task));
    }
    return texts;
  };
  using Texts = std::vector<std::string>;
  EXPECT_EQ(tasks("Stack(a, b)"), Texts());
  EXPECT_EQ(tasks("MultiTask(a, Stack(b))"), (Texts{"a", "b"}));
  EXPECT_EQ(tasks("Stack(a, MultiTask(b, Stack(c, d)), e)"), (Texts{"Stack(a, b, e)", "Stack(a, c, d, e)"}));
  EXPECT_EQ(tasks("Stack(MultiTask(a, b), MultiTask(c, a))"), (Texts{"Stack(a, c)", "Stack(b, a)"}));
  EXPECT_EQ(adapters_in_tasks(composition_from_string("Stack(a, MultiTask(b, Stack(c, b)))")), (Texts{"b", "c"}));
}

TEST(Composition, BlocksThatNoTaskHasAreNamedWithTheRemedy) {
  const auto error = [](const char* text) {
    try {
      check_tasks(composition_from_string(text), "compose");
    } catch (const c10::Error& thrown) {
      return std::string(thrown.what_without_backtrace());
    }
    return std::string();
  };
  EXPECT_EQ(error("Stack(Parallel(a, b), MultiTask(a, b))"),
            "compose: Stack(Parallel(a, b), MultiTask(a, b)): Parallel and MultiTask both say which rows an adapter "
            "gets; compose them under names of their own, and give each row its id in adapter_ids");
  EXPECT_EQ(error("Stack(a, Fuse(b, Stack(c, a)), d)"), "");
  EXPECT_EQ(error("Stack(a, MultiTask(b, c))"), "");
}

TEST(Composition, ParallelRepeatsRowsOnce) {
  EXPECT_EQ(parallel_channels(composition_from_string("Stack(a, Parallel(b, c, a))")), 3);
  EXPECT_EQ(parallel_channels(composition_from_string("Average(a, b)")), 1);
  EXPECT_TRUE(has_parallel(composition_from_string("Parallel(a)")));
  EXPECT_FALSE(has_parallel(composition_from_string("Stack(a, b)")));
  EXPECT_NE(error_of("Stack(Parallel(a, b), Parallel(a, b, c))").find("different numbers of children"),
            std::string::npos);
  EXPECT_NE(error_of("Stack(BatchSplit(a, b, batch_sizes=[1, 2]), Parallel(a, b))").find("behind a BatchSplit"),
            std::string::npos);
}

TEST(Composition, ErrorsShowLittleOfALongText) {
  const std::string text(5000, 'x');
  const std::string many = "Stack(" + std::string(900, 'a') + ", Stack(" + std::string(900, 'b') + "))";
  for (const std::string& wrong : {"Stack(" + text + ")", "Stack('" + text + "')", text + "(a)", many}) {
    const std::string error = error_of(wrong);
    EXPECT_NE(error.find("composition"), std::string::npos) << error;
    EXPECT_LT(error.size(), 1000u);
  }
  for (const std::string& wrong :
       {R"({"type": ")" + text + R"(", "children": []})", R"({"type": "Stack", "children": [], ")" + text + R"(": 1})",
        R"({"type": "Stack", "children": [{"type": "single", "children": [")" + text + R"("]}]})"}) {
    try {
      composition_from_json(wrong);
      ADD_FAILURE() << "took a text of " << text.size() << " bytes";
    } catch (const c10::Error& error) {
      EXPECT_LT(std::string(error.what_without_backtrace()).size(), 1000u);
    }
  }
}

TEST(Composition, NamesOfFusions) {
  EXPECT_EQ(fusion_names(composition_from_string("Stack(a, Fuse(b, Stack(c, a)), Fuse(b, a), Fuse(d, name=e))")),
            (std::vector<std::string>{"b,a", "e"}));
  EXPECT_TRUE(fusion_names(composition_from_string("Stack(a, b)")).empty());
}

TEST(Composition, JsonIsReadByAnAllowList) {
  for (const std::string json : {R"({"type": "Stack"})", R"({"type": "Stack", "children": [], "more": 1})",
                                 R"({"type": "Stack", "children": ["a"]})",
                                 R"({"type": "Stack", "children": [{"type": "single", "children": [1]}]})",
                                 R"({"type": "single", "children": ["a"]})",
                                 R"({"type": "Heap", "children": [{"type": "single", "children": ["a"]}]})",
                                 R"({"type": "Stack", "children": [{"type": "single", "children": ["a"]}],
                                     "kwargs": {"weights": [1]}})"}) {
    EXPECT_THROW(composition_from_json(json), c10::Error) << json;
  }
}

}  // namespace
}  // namespace torchgraft
